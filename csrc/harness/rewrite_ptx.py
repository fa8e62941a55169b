"""Copies a CUDA source, turning inline assembly into calls of the PTX interpreter.

    asm volatile("TEXT" : "=r"(x) : "l"(p) : "memory");
becomes
    ::cuda_on_cpu::ptx("TEXT", ::cuda_on_cpu::output("=r", x), ::cuda_on_cpu::input("l", p));

so that a plain C++ compiler runs the text that ptxas will see. Line numbers are kept, and `__CUDA_ARCH__` becomes
CUDA_ON_CPU_ARCH, so that architecture guards take the device's branch.
"""

import re

TOKEN = re.compile(
    r"""//[^\n]*|/\*.*?\*/|R"\((?:.*?)\)"|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\\n])'|\basm\b|\b__asm__\b|[(){}\[\]:,]""", re.S
)
OPENING = re.compile(r"\s*(?:volatile\b|__volatile__\b)?\s*\(")
OPERAND = re.compile(r'\s*("[^"]*")\s*\((.*)\)\s*', re.S)


def split_top_level(text, separator):
    """Parts of `text` between separators that stand outside brackets, strings and comments."""
    parts, depth, start = [], 0, 0
    for match in TOKEN.finditer(text):
        token = match.group()
        if token in "([{":
            depth += 1
        elif token in ")]}":
            depth -= 1
        elif token == separator and depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


def closing_parenthesis(source, begin):
    """Index of the parenthesis that closes the one just before `begin`."""
    depth = 1
    for match in TOKEN.finditer(source, begin):
        depth += {"(": 1, ")": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    raise ValueError("unbalanced parentheses after asm")


def convert_operand(text, function):
    match = OPERAND.fullmatch(text)
    if not match:
        raise ValueError(f"cannot read the asm operand {text!r}")
    return f"::cuda_on_cpu::{function}({match.group(1)}, {match.group(2).strip()})"


def convert_statement(body):
    """The call that replaces `asm(body)`."""
    sections = split_top_level(body, ":")
    arguments = [sections[0].strip()]
    for section, function in zip(sections[1:3], ("output", "input"), strict=False):
        if section.strip():
            arguments += [convert_operand(operand, function) for operand in split_top_level(section, ",")]
    return f"::cuda_on_cpu::ptx({', '.join(arguments)})"


def rewrite(source):
    """Returns `source` with its asm statements converted; every line keeps its number."""
    pieces, position, search_from = [], 0, 0
    while match := TOKEN.search(source, search_from):
        search_from = match.end()
        opening = OPENING.match(source, match.end()) if match.group() in ("asm", "__asm__") else None
        if not opening:
            continue
        end = closing_parenthesis(source, opening.end())
        call = convert_statement(source[opening.end() : end])
        lost_lines = source.count("\n", match.start(), end) - call.count("\n")
        pieces += [source[position : match.start()], call, "\n" * lost_lines]
        position = search_from = end + 1
    return re.sub(r"\b__CUDA_ARCH__\b", "CUDA_ON_CPU_ARCH", "".join(pieces) + source[position:])
