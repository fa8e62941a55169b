"""Every public name of BackPACK as data: a small call of each, and what a reader of docs/backpack.md should know."""

import copy
import importlib
import pkgutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 2, 1, 1])


class Library:
    """BackPACK or backpack_cuda; `library("extensions.KFAC")` imports a name."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, path: str) -> Any:
        module, _, attribute = path.rpartition(".")
        return getattr(importlib.import_module(f"{self.name}.{module}" if module else self.name), attribute)


@dataclass(frozen=True)
class Name:
    """A public name: its path in the package, a small call, and a remark for the table."""

    path: str
    call: Callable[[Library], Any]  # two libraries agree where its results are equal
    remark: str = ""


def model() -> nn.Sequential:
    """A small float64 network."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3)).double()


def after_step(library: Library, extension, **options) -> nn.Module:
    """The extended model after one backward pass with the extension."""
    extended, loss_function = library("extend")(model()), library("extend")(nn.CrossEntropyLoss())
    loss = loss_function(extended(X), Y)
    with library("backpack")(extension, **options):
        loss.backward()
    return extended


def saved(path: str, sampled: bool = False, **options) -> Callable[[Library], Any]:
    """What an extension saves; of one that draws random numbers the shapes."""

    def call(library: Library):
        extension = library(path)(**options)
        results = []
        for p in after_step(library, extension).parameters():
            value = getattr(p, extension.savefield)
            if callable(value):
                value = value(torch.stack((torch.ones_like(p), torch.arange(p.numel()).to(p).view_as(p))))
            values = list(value) if isinstance(value, list) else [value]
            results.append([list(v.shape) if sampled else v for v in values])
        return extension.savefield, results

    return call


def constants(path: str, *attributes: str) -> Callable[[Library], Any]:
    """The constants of a class."""
    return lambda library: [getattr(library(path), attribute) for attribute in attributes]


def extend(library: Library):
    module = model()
    extended = library("extend")(module)
    return extended is module, extended[0]._backpack_extend, library("extend")(extended) is module


def context(library: Library):
    with library("backpack")(library("extensions.BatchGrad")()) as entered:
        inside = len(library("context.CTX").get_active_exts())
    return entered, inside, len(library("context.CTX").get_active_exts())


def disable(library: Library):
    extended, outside = library("extend")(model()), library("disable").should_store_io()
    with library("disable")():
        extended(X)
        return outside, library("disable").should_store_io(), hasattr(extended[0], "input0")


def memory_cleanup(library: Library):
    module = nn.Linear(1, 1)
    module.input0, module.input1, module.output = X, X, X
    library("memory_cleanup")(module)
    return [hasattr(module, name) for name in ("input0", "input1", "output")]


def hook_store_io(library: Library):
    module = nn.Linear(3, 3)
    library("hook_store_io")(module, (X, 2 * X), (3 * X, 4 * X))
    return module.input0, module.input1, module.output


def remove_hooks(library: Library):
    """As Laplace does, and then extends the model again."""
    extended = library("extend")(model())
    library("context.CTX").remove_hooks()
    for module in extended.modules():
        module._backpack_extend = False
    return [p.grad_batch for p in after_step_of(library, extended, library("extensions.BatchGrad")()).parameters()]


def after_step_of(library: Library, module: nn.Module, extension) -> nn.Module:
    extended = library("extend")(module)
    loss = nn.functional.cross_entropy(extended(X), Y)
    with library("backpack")(extension):
        loss.backward()
    return extended


def context_state(name: str, value) -> Callable[[Library], Any]:
    """A setter of CTX, and its getter."""

    def call(library: Library):
        context = library("context.CTX")
        before = getattr(context, f"get_{name}")()
        getattr(context, f"set_{name}")(value)
        after = getattr(context, f"get_{name}")()
        getattr(context, f"set_{name}")(before)
        return after

    return call


def active(library: Library):
    extensions = library("extensions.BatchGrad"), library("extensions.KFAC")
    with library("backpack")(extensions[0]()):
        return [library("context.CTX").is_extension_active(e) for e in extensions]


def own_extension(library: Library):
    """A quantity of the user's own: the squared output gradient of every Linear layer."""

    class Squares(library("extensions.firstorder.base.FirstOrderModuleExtension")):
        def __init__(self):
            super().__init__(params=["bias"])

        def bias(self, ext, module, g_inp, g_out, bpQuantities):
            return g_out[0].square().sum(0)

    base = library("extensions.backprop_extension.BackpropExtension")

    class Own(base):
        def __init__(self):
            super().__init__("own", {nn.Linear: Squares()}, fail_mode="SILENT")

        def expects_backpropagation_quantities(self):
            return False

    return [getattr(p, "own", None) for p in after_step(library, Own()).parameters()]


def module_extension(library: Library):
    """Another layer for BatchGrad: one that scales its input."""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))

        def forward(self, input):
            return input * self.weight

    class ScaleGradients(library("extensions.module_extension.ModuleExtension")):
        def __init__(self):
            super().__init__(params=["weight"])

        def weight(self, ext, module, g_inp, g_out, bpQuantities):
            return module.input0 * g_out[0]

    extension = library("extensions.BatchGrad")()
    extension.set_module_extension(Scale, ScaleGradients())
    return after_step_of(library, nn.Sequential(Scale(), model()), extension)[0].weight.grad_batch


class Softmax:
    """The derivatives of a loss of one's own, as far as a Gauss-Newton diagonal needs them."""

    def sqrt_hessian(self, module, g_inp, g_out, **options) -> Tensor:
        p = module.input0.detach().softmax(1)  # [N, C]
        columns = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None]  # [N, C, V]
        return columns.permute(2, 0, 1) / len(p) ** 0.5


def diag_ggn_loss(library: Library):
    """The advice to users of losses of their own."""
    loss = type("OwnLoss", (nn.CrossEntropyLoss,), {})
    extension = library("extensions.secondorder.diag_ggn.DiagGGNExact")()
    extension.set_module_extension(loss, library("extensions.secondorder.diag_ggn.losses.DiagGGNLoss")(Softmax()))
    extended = library("extend")(model())
    value = library("extend")(loss())(extended(X), Y)
    with library("backpack")(extension):
        value.backward()
    return [p.diag_ggn_exact for p in extended.parameters()]


FACTORS = [torch.tensor([[2.0, 0.5], [0.5, 1.0]]), torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]])]
CONV = nn.Conv2d(2, 4, 2, stride=2, padding=1, groups=2).double()
IMAGES = torch.arange(36.0, dtype=torch.float64).view(2, 2, 3, 3)
TRANSPOSED = nn.ConvTranspose2d(2, 4, 2, stride=2).double()
ROOT = torch.linspace(-1, 1, 2 * 2 * 4 * 4, dtype=torch.float64).view(2, 2, 4, 2, 2)  # [V, N, C, H, W]
TRANSPOSED_ROOT = torch.linspace(-1, 1, 2 * 2 * 4 * 36, dtype=torch.float64).view(2, 2, 4, 6, 6)


def with_input(module: nn.Module, input: Tensor) -> nn.Module:
    """The module as BackPACK's functions expect it in a backward pass."""
    module = copy.deepcopy(module)
    module.input0, module.output = input, module(input)
    return module


def curvature_product(path: str) -> Callable[[Library], Any]:
    """One of the functions of `hessianfree` on the small network."""

    def call(library: Library):
        module = model()
        parameters = list(module.parameters())
        output = module(X)
        loss = nn.functional.cross_entropy(output, Y)
        vectors = [torch.ones_like(p) for p in parameters]
        function = library(path)
        name = path.rpartition(".")[2]
        if name == "ggn_vector_product":
            return function(loss, output, module, vectors)
        if name == "ggn_vector_product_from_plist":
            return function(loss, output, parameters[:2], vectors[:2])
        if name == "hessian_vector_product":
            return function(loss, parameters, vectors)
        return function(output, parameters, output.detach() if "L_op" in name or "transposed" in name else vectors)

    return call


def derivative_classes() -> list[str]:
    """Paths of the classes of `core.derivatives`, from BackPACK itself."""
    package = importlib.import_module("backpack.core.derivatives")
    found = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        names = [n for n, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__]
        found += [f"core.derivatives.{info.name}.{name}" for name in names if name.endswith("Derivatives")]
    return sorted(found)


def calls_module(path: str, input: Tensor, *arguments, **options) -> Callable[[Library], Any]:
    """The output of a module of the library."""
    return lambda library: library(path)(*arguments, **options)(input)


def parallel(library: Library):
    sums = library("custom_module.branching.SumModule")()
    container = library("custom_module.branching.Parallel")(nn.Identity(), nn.Tanh(), merge_module=sums)
    return container(X)


def branch(library: Library):
    return list(library("custom_module.branching._Branch")(nn.Identity(), nn.Tanh())(X))


def converted(library: Library):
    """A residual sum, which BackPACK's quantities see after conversion only."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3).double()

        def forward(self, x):
            return x + self.layer(x)

    torch.manual_seed(0)
    module = library("extend")(library("convert_module_to_backpack")(Residual(), False))
    loss = library("extend")(nn.CrossEntropyLoss())(module(X), Y)
    with library("backpack")(library("extensions.DiagGGNExact")()):
        loss.backward()
    return [p.diag_ggn_exact for p in module.parameters()]


def save_memory(library: Library):
    with library("core.derivatives.convnd.weight_jac_t_save_memory")(save_memory=True):
        return saved("extensions.BatchGrad")(library)


HBP_OPTIONS = "extensions.secondorder.hbp"


def hbp(library: Library):
    """Hessian backpropagation as in its paper: batch averages, the residuals of the Hessian."""
    curvature = library("extensions.curvature.Curvature")
    strategies = [library(f"{HBP_OPTIONS}.{name}") for name in ("LossHessianStrategy", "BackpropStrategy")]
    approximation = library(f"{HBP_OPTIONS}.ExpectationApproximation")
    extension = library("extensions.HBP")(
        curvature.HESSIAN, strategies[0].SUM, strategies[1].BATCH_AVERAGE, approximation.BOTEV_MARTENS
    )
    return [p.hbp for p in after_step(library, extension).parameters()]


def diag_ggn_from_autograd(library: Library):
    return list(library("utils.examples.autograd_diag_ggn_exact")(X, Y, model(), nn.CrossEntropyLoss()))


def subsampling(library: Library):
    return library("extensions.BatchGrad")(subsampling=[0, 2]).get_subsampling()


def classified(path: str) -> Callable[[Library], Any]:
    modules = nn.CrossEntropyLoss(), nn.MSELoss(), nn.Linear(1, 1), nn.Sequential(), nn.BCEWithLogitsLoss()
    return lambda library: [library(path)(module) for module in modules]


def batch_norm_error(library: Library):
    check = library("utils.errors.batch_norm_raise_error_if_train")
    check(nn.BatchNorm1d(2).eval())
    try:
        check(nn.BatchNorm1d(2))
    except NotImplementedError:
        return "NotImplementedError"


def accumulate(library: Library):
    """Of an own quantity that does not define it."""

    class Own(library("extensions.backprop_extension.BackpropExtension")):
        def expects_backpropagation_quantities(self):
            return True

    try:
        Own("own", {}).accumulate_backpropagated_quantities(X, X)
    except NotImplementedError:
        return "NotImplementedError"


BASE = "extensions.backprop_extension."
SECTIONS: dict[str, list[Name]] = {
    "The package": [
        Name("extend", extend, "functional code between the modules is free; `use_converter=True` converts nothing"),
        Name("backpack", context, "also takes `memory_budget`"),
        Name("disable", disable),
        Name("memory_cleanup", memory_cleanup),
        Name("hook_store_io", hook_store_io),
        Name("hook_run_extensions", lambda library: library("hook_run_extensions")(nn.Linear(1, 1), (None,), (X,))),
        Name("convert_module_to_backpack", converted, "returns the module: nothing needs conversion"),
        Name("no_op", lambda library: library("no_op")(1, a=2)),
        Name("is_no_op", classified("is_no_op")),
        Name("BackpropExtension", lambda library: library("BackpropExtension").__name__),
        Name("context.CTX.get_active_exts", context),
        Name("context.CTX.set_active_exts", context_state("active_exts", ())),
        Name("context.CTX.is_extension_active", active),
        Name("context.CTX.get_debug", context_state("debug", False)),
        Name("context.CTX.set_debug", context_state("debug", True)),
        Name(
            "context.CTX.get_extension_hook",
            lambda library: library("context.CTX").get_extension_hook()(nn.Linear(1, 1)),
        ),
        Name("context.CTX.set_extension_hook", context_state("extension_hook", print)),
        Name("context.CTX.get_retain_graph", context_state("retain_graph", False)),
        Name("context.CTX.set_retain_graph", context_state("retain_graph", True)),
        Name("context.CTX.add_hook_handle", lambda library: library("context.CTX").add_hook_handle(handle())),
        Name("context.CTX.remove_hooks", remove_hooks, "other models keep working"),
    ],
    "Quantities": [
        *(
            Name(f"extensions.{name}", saved(f"extensions.{name}"))
            for name in ("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance", "DiagGGNExact", "BatchDiagGGNExact")
        ),
        *(
            Name(f"extensions.{name}", saved(f"extensions.{name}", sampled=True, mc_samples=2), "the draws differ")
            for name in ("DiagGGNMC", "BatchDiagGGNMC", "SqrtGGNMC")
        ),
        Name("extensions.SqrtGGNExact", saved("extensions.SqrtGGNExact")),
        Name("extensions.KFAC", saved("extensions.KFAC", sampled=True, mc_samples=2), "the draws differ"),
        *(Name(f"extensions.{name}", saved(f"extensions.{name}")) for name in ("KFLR", "KFRA")),
        Name("extensions.HBP", hbp),
        *(
            Name(f"extensions.{name}", saved(f"extensions.{name}"))
            for name in ("DiagHessian", "BatchDiagHessian", "HMP", "GGNMP")
        ),
        Name("extensions.PCHMP", saved("extensions.PCHMP", modify="clip"), "right behind Sigmoid and Tanh, too"),
    ],
    "Base classes and options of quantities": [
        Name("extensions.backprop_extension.BackpropExtension", own_extension),
        Name("extensions.backprop_extension.FAIL_ERROR", lambda library: library(BASE + "FAIL_ERROR")),
        Name("extensions.backprop_extension.FAIL_WARN", lambda library: library(BASE + "FAIL_WARN")),
        Name("extensions.backprop_extension.FAIL_SILENT", lambda library: library(BASE + "FAIL_SILENT")),
        Name("BackpropExtension.savefield", lambda library: library("extensions.KFLR")().savefield),
        Name("BackpropExtension.set_module_extension", module_extension),
        Name(
            "BackpropExtension.saved_quantities",
            lambda library: (
                after_step(library, extension := library("extensions.DiagGGNExact")()),
                extension.saved_quantities._saved_quantities,
            )[1],
            "always empty: nothing is kept between modules",
        ),
        Name("BackpropExtension.get_subsampling", subsampling),
        Name(
            "BackpropExtension.expects_backpropagation_quantities",
            lambda library: [
                library(f"extensions.{name}")().expects_backpropagation_quantities() for name in ("BatchGrad", "KFLR")
            ],
        ),
        Name(
            "BackpropExtension.accumulate_backpropagated_quantities",
            accumulate,
            "for quantities of one's own; autograd adds up those of the library",
        ),
        Name("DiagGGNMC.get_num_mc_samples", lambda library: library("extensions.DiagGGNMC")(3).get_num_mc_samples()),
        Name(
            "KFAC.get_curv_type, get_loss_hessian_strategy, get_backprop_strategy, get_ea_strategy",
            lambda library: [
                [getattr(library(f"extensions.{name}")(), f"get_{option}")() for option in options]
                for options in [("curv_type", "loss_hessian_strategy", "backprop_strategy", "ea_strategy")]
                for name in ("KFAC", "KFLR", "KFRA")
            ],
        ),
        Name("extensions.module_extension.ModuleExtension", module_extension),
        Name(
            "ModuleExtension.check_hyperparameters_module_extension",
            lambda library: library("extensions.module_extension.ModuleExtension")(
                []
            ).check_hyperparameters_module_extension(library("extensions.BatchGrad")(), nn.ReLU(), (), ()),
        ),
        Name("extensions.firstorder.base.FirstOrderModuleExtension", own_extension),
        *(
            Name(path, saved(path))
            for path in ("extensions.firstorder.BatchGrad", "extensions.secondorder.KFLR", "extensions.curvmatprod.HMP")
        ),
        Name("extensions.secondorder.diag_ggn.DiagGGNExact", saved("extensions.secondorder.diag_ggn.DiagGGNExact")),
        Name("extensions.secondorder.diag_ggn.losses.DiagGGNLoss", diag_ggn_loss),
        Name(
            "extensions.curvature.Curvature",
            constants("extensions.curvature.Curvature", "HESSIAN", "GGN", "PCH_ABS", "PCH_CLIP"),
        ),
        Name(
            f"{HBP_OPTIONS}.LossHessianStrategy",
            constants(f"{HBP_OPTIONS}.LossHessianStrategy", "EXACT", "SAMPLING", "SUM"),
        ),
        Name(f"{HBP_OPTIONS}.BackpropStrategy", constants(f"{HBP_OPTIONS}.BackpropStrategy", "SQRT", "BATCH_AVERAGE")),
        Name(
            f"{HBP_OPTIONS}.ExpectationApproximation",
            constants(f"{HBP_OPTIONS}.ExpectationApproximation", "BOTEV_MARTENS", "CHEN"),
        ),
    ],
    "Utilities": [
        Name("utils.kroneckers.kfacs_to_mat", lambda library: library("utils.kroneckers.kfacs_to_mat")(FACTORS)),
        Name(
            "utils.kroneckers.two_kfacs_to_mat",
            lambda library: library("utils.kroneckers.two_kfacs_to_mat")(*FACTORS),
        ),
        Name(
            "utils.kroneckers.kfac_mat_prod",
            lambda library: library("utils.kroneckers.kfac_mat_prod")(FACTORS)(torch.eye(6)),
        ),
        Name(
            "utils.kroneckers.apply_kfac_mat_prod",
            lambda library: library("utils.kroneckers.apply_kfac_mat_prod")(FACTORS, torch.ones(6)),
        ),
        Name("utils.kroneckers.inv_kfacs", lambda library: library("utils.kroneckers.inv_kfacs")(FACTORS, 0.1)),
        Name(
            "utils.kroneckers.inv_kfac_mat_prod",
            lambda library: library("utils.kroneckers.inv_kfac_mat_prod")(FACTORS, shift=0.1)(torch.eye(6)),
        ),
        Name(
            "utils.kroneckers.apply_inv_kfac_mat_prod",
            lambda library: library("utils.kroneckers.apply_inv_kfac_mat_prod")(FACTORS, torch.ones(6), shift=0.1),
        ),
        Name(
            "utils.kroneckers.kfac_mat_prod_einsum_equation",
            lambda library: library("utils.kroneckers.kfac_mat_prod_einsum_equation")(2).replace(" ", "").count("->"),
        ),
        Name("utils.kroneckers.is_matrix", lambda library: library("utils.kroneckers.is_matrix")(FACTORS[0])),
        Name("utils.kroneckers.is_vector", lambda library: library("utils.kroneckers.is_vector")(FACTORS[0])),
        Name(
            "utils.kroneckers.all_tensors_of_order",
            lambda library: library("utils.kroneckers.all_tensors_of_order")(2, FACTORS),
        ),
        Name("utils.kroneckers.get_letters", lambda library: len(set(library("utils.kroneckers.get_letters")(5)))),
        Name(
            "utils.convert_parameters.vector_to_parameter_list",
            lambda library: library("utils.convert_parameters.vector_to_parameter_list")(
                torch.arange(8.0), [torch.zeros(2, 3), torch.zeros(2)]
            ),
        ),
        Name("utils.conv.unfold_input", lambda library: library("utils.conv.unfold_input")(CONV, IMAGES)),
        Name("utils.conv.unfold_by_conv", lambda library: library("utils.conv.unfold_by_conv")(IMAGES, CONV)),
        Name(
            "utils.conv.get_weight_gradient_factors",
            lambda library: library("utils.conv.get_weight_gradient_factors")(IMAGES, ROOT[0], CONV),
        ),
        Name(
            "utils.conv.extract_weight_diagonal",
            lambda library: library("utils.conv.extract_weight_diagonal")(
                CONV, library("utils.conv.unfold_input")(CONV, IMAGES), ROOT
            ),
        ),
        Name(
            "utils.conv.extract_bias_diagonal",
            lambda library: library("utils.conv.extract_bias_diagonal")(CONV, ROOT, sum_batch=False),
        ),
        Name("utils.conv.get_conv_module", lambda library: library("utils.conv.get_conv_module")(2).__name__),
        Name("utils.conv.get_conv_function", lambda library: library("utils.conv.get_conv_function")(3).__name__),
        Name(
            "utils.conv_transpose.unfold_by_conv_transpose",
            lambda library: library("utils.conv_transpose.unfold_by_conv_transpose")(IMAGES, TRANSPOSED),
        ),
        Name(
            "utils.conv_transpose.get_weight_gradient_factors",
            lambda library: library("utils.conv_transpose.get_weight_gradient_factors")(
                IMAGES, TRANSPOSED_ROOT[0], TRANSPOSED
            ),
        ),
        Name(
            "utils.conv_transpose.extract_weight_diagonal",
            lambda library: library("utils.conv_transpose.extract_weight_diagonal")(
                TRANSPOSED,
                library("utils.conv_transpose.unfold_by_conv_transpose")(IMAGES, TRANSPOSED),
                TRANSPOSED_ROOT,
            ),
        ),
        Name(
            "utils.conv_transpose.extract_bias_diagonal",
            lambda library: library("utils.conv_transpose.extract_bias_diagonal")(TRANSPOSED, TRANSPOSED_ROOT),
        ),
        Name(
            "utils.linear.extract_weight_diagonal",
            lambda library: library("utils.linear.extract_weight_diagonal")(
                with_input(nn.Linear(3, 2).double(), X), torch.ones(2, 4, 2, dtype=torch.float64)
            ),
        ),
        Name(
            "utils.linear.extract_bias_diagonal",
            lambda library: library("utils.linear.extract_bias_diagonal")(
                with_input(nn.Linear(3, 2).double(), X), torch.ones(2, 4, 2, dtype=torch.float64)
            ),
        ),
        Name(
            "utils.subsampling.subsample",
            lambda library: library("utils.subsampling.subsample")(X, dim=0, subsampling=[2, 0]),
        ),
        Name("utils.module_classification.is_loss", classified("utils.module_classification.is_loss")),
        Name("utils.module_classification.is_nll", classified("utils.module_classification.is_nll")),
        Name("utils.module_classification.is_no_op", classified("utils.module_classification.is_no_op")),
        Name("utils.errors.batch_norm_raise_error_if_train", batch_norm_error),
        Name("utils.hooks.no_op", lambda library: library("utils.hooks.no_op")(1, 2)),
        Name(
            "utils.unsqueeze.kfacmp_unsqueeze_if_missing_dim",
            lambda library: library("utils.unsqueeze.kfacmp_unsqueeze_if_missing_dim")(2)(lambda m: m * 2)(X[0]),
        ),
        Name("utils.examples.autograd_diag_ggn_exact", diag_ggn_from_autograd, "BackPACK's needs torchvision"),
        *(
            Name(f"utils.examples.{name}", lambda library, name=name: callable(library(f"utils.examples.{name}")))
            for name in ("load_mnist_dataset", "get_mnist_dataloader", "load_one_batch_mnist")
        ),
    ],
    "Hessian-free": [
        *(
            Name(f"hessianfree.{name}", curvature_product(f"hessianfree.{name}"))
            for name in (
                "ggnvp.ggn_vector_product",
                "ggnvp.ggn_vector_product_from_plist",
                "hvp.hessian_vector_product",
                "lop.L_op",
                "lop.transposed_jacobian_vector_product",
                "rop.R_op",
                "rop.jacobian_vector_product",
            )
        ),
    ],
    "Custom modules": [
        Name("custom_module.branching._Branch", branch),
        Name("custom_module.branching.Parallel", parallel),
        Name(
            "custom_module.branching.SumModule",
            lambda library: library("custom_module.branching.SumModule")()(X, 2 * X),
        ),
        Name("custom_module.scale_module.ScaleModule", calls_module("custom_module.scale_module.ScaleModule", X, 0.5)),
        Name("custom_module.permute.Permute", calls_module("custom_module.permute.Permute", X[None], 0, 2, 1)),
        Name("custom_module.pad.Pad", calls_module("custom_module.pad.Pad", X, (1, 2), value=3.0)),
        Name(
            "custom_module.slicing.Slicing",
            calls_module("custom_module.slicing.Slicing", X, (slice(None), slice(1, 3))),
        ),
        Name(
            "custom_module.reduce_tuple.ReduceTuple",
            calls_module("custom_module.reduce_tuple.ReduceTuple", (X, Y), index=1),
        ),
        Name(
            "custom_module.graph_utils.convert_module_to_backpack",
            lambda library: converted(library),
            "returns the module: nothing needs conversion",
        ),
        Name(
            "custom_module.graph_utils.BackpackTracer",
            lambda library: isinstance(library("custom_module.graph_utils.BackpackTracer")(), torch.fx.Tracer),
        ),
    ],
    "Derivatives": [
        Name("core.derivatives.convnd.weight_jac_t_save_memory", save_memory, "accepted; changes nothing"),
    ],
}


def handle():
    """A handle of a hook."""
    return nn.Linear(1, 1).register_forward_hook(lambda *arguments: None)


def quietly(call: Callable[[Library], Any], library: Library):
    """A call's result; BackPACK's warnings are of no interest here."""
    with warnings.catch_warnings():
        if library.name == "backpack":
            warnings.simplefilter("ignore")
        return call(library)
