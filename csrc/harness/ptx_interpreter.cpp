// Executes the text of inline PTX statements: code with predicates and branches, the instructions of sm_80
// (here) and sm_90 (ptx_interpreter_sm90.cpp) that the kernels use. Anything else throws, naming the
// instruction and the place.
#include <cstdlib>
#include <unordered_map>

#include "harness/ptx_execution.h"
#include "harness/sanitizers.h"

namespace cuda_on_cpu {
namespace ptx_interpreter {
namespace {

string trim(const string& text) {
  const size_t first = text.find_first_not_of(" \t\n\r");
  return first == string::npos ? "" : text.substr(first, text.find_last_not_of(" \t\n\r") - first + 1);
}

const MmaShape mma_shapes[] = {
    {"mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32", MmaElement::kTf32, 4, 2, 1},
    {"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", MmaElement::kTf32, 8, 4, 2},
    {"mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32", MmaElement::kBFloat16, 8, 2, 1},
    {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", MmaElement::kBFloat16, 16, 4, 2},
    {"mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32", MmaElement::kFloat16, 8, 2, 1},
    {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", MmaElement::kFloat16, 16, 4, 2}};

// Splits at separators outside brackets.
vector<string> split(const string& text, char separator) {
  vector<string> parts;
  string part;
  int depth = 0;
  for (char c : text) {
    if (c == '{' || c == '[') ++depth;
    if (c == '}' || c == ']') --depth;
    if (c == separator && depth == 0) {
      parts.push_back(trim(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trim(part).empty()) parts.push_back(trim(part));
  return parts;
}

class Parser {
 public:
  Parser(const char* text, Site site) : text_(text), site_(site) {}

  Program parse() {
    string text = text_;
    for (size_t at; (at = text.find("%%")) != string::npos;)
      text.replace(at, 2, "$");  // a register's percent sign
    Program program;
    for (const string& piece : statements(text)) {
      if (piece.back() == ':') {
        program.labels[trim(piece.substr(0, piece.size() - 1))] = program.instructions.size();
      } else if (piece.compare(0, 5, ".reg ") != 0) {
        program.instructions.push_back(instruction(piece));
      }
    }
    return program;
  }

 private:
  [[noreturn]] void bad(const string& what, const string& text) {
    fail(("PTX: " + what + ": " + text).c_str(), site_);
  }

  // Ends at semicolons, a label at its colon. A brace at the start of a statement opens or closes a scope and
  // is dropped.
  static vector<string> statements(const string& text) {
    vector<string> pieces;
    string piece;
    int depth = 0;
    for (size_t i = 0; i < text.size(); ++i) {
      const char c = text[i];
      if (trim(piece).empty() && depth == 0 && (c == '{' || c == '}')) continue;
      if (c == '{') ++depth;
      if (c == '}') --depth;
      const bool ends_label = c == ':' && depth == 0 && text[i + 1] != ':' && i > 0 && text[i - 1] != ':' &&
                              trim(piece).find_first_of(" \t\n.[") == string::npos;
      if (ends_label) {
        pieces.push_back(trim(piece) + ':');
        piece.clear();
      } else if (c == ';') {
        if (!trim(piece).empty()) pieces.push_back(trim(piece));
        piece.clear();
      } else {
        piece += c;
      }
    }
    if (!trim(piece).empty()) pieces.push_back(trim(piece));
    return pieces;
  }

  uint64_t number(const string& text) {
    char* end = nullptr;
    const uint64_t value = uint64_t(strtoll(text.c_str(), &end, 0));
    if (*end) bad("unsupported literal", text);
    return value;
  }

  Operand operand(const string& text) {
    if (text.empty()) bad("empty operand", text_);
    if (text[0] != '{' && text[0] != '[' && text.find('|') != string::npos) {  // two results: d|p
      Operand pair{Operand::kVector, 0, 0, "", {}};
      for (const string& part : split(text, '|')) pair.parts.push_back(operand(part));
      return pair;
    }
    if (text[0] == '%') return {Operand::kArgument, int(number(text.substr(1))), 0, "", {}};
    if (text == "_") return {Operand::kSink, 0, 0, "", {}};
    if (isdigit(text[0]) || text[0] == '-') return {Operand::kLiteral, 0, number(text), "", {}};
    const string inner = text.substr(1, text.size() - 2);
    if (text[0] == '{') {
      Operand vector_operand{Operand::kVector, 0, 0, "", {}};
      for (const string& part : split(inner, ',')) vector_operand.parts.push_back(operand(part));
      return vector_operand;
    }
    if (text[0] == '[') {
      const vector<string> parts = split(inner, ',');
      const vector<string> sum = parts.empty() ? parts : split(parts[0], '+');
      if (sum.empty() || sum.size() > 2) bad("unsupported address", text);
      Operand address{Operand::kMemory, 0, sum.size() == 2 ? number(sum[1]) : 0, "", {operand(sum[0])}};
      for (size_t p = 1; p < parts.size(); ++p) address.parts.push_back(operand(parts[p]));
      return address;
    }
    return {Operand::kRegister, 0, 0, text, {}};
  }

  Instruction instruction(string text) {
    Instruction result;
    if (text[0] == '@') {
      const size_t end = text.find_first_of(" \t\n");
      if (end == string::npos) bad("a predicate alone", text);
      result.negated = text[1] == '!';
      result.predicate = text.substr(result.negated ? 2 : 1, end - (result.negated ? 2 : 1));
      text = trim(text.substr(end));
    }
    const size_t end = text.find_first_of(" \t\n[");
    result.opcode = text.substr(0, end);
    result.modifiers = split(result.opcode, '.');
    for (const MmaShape& shape : mma_shapes) {
      if (result.opcode == shape.opcode) result.mma = &shape;
    }
    if (end != string::npos) {
      for (const string& part : split(text.substr(end), ',')) result.operands.push_back(operand(part));
    }
    return result;
  }

  const char* text_;
  Site site_;
};

}  // namespace

void Execution::step() {
  const string& opcode = now_->opcode;
  if (opcode_starts("mma.sync.aligned.")) bad("unsupported mma shape or type");
  if (opcode_starts("ldmatrix.sync.aligned.m8n8.")) return ldmatrix();
  if (opcode_starts("cp.async.ca.shared.global") || opcode_starts("cp.async.cg.shared.global"))
    return cp_async();
  if (opcode == "cp.async.commit_group") return async_commit_group();
  if (opcode == "cp.async.wait_group") return async_wait_group(unsigned(get(operand(0))));
  if (opcode == "cp.async.wait_all") return async_wait_all();
  if (opcode == "cvt.rna.tf32.f32") return set(operand(0), round_to_tf32(get_float(operand(1))));
  if (opcode == "bar.sync" || opcode == "barrier.sync") {
    const unsigned threads = operand_count() > 1 ? unsigned(get(operand(1))) : 0;
    block_barrier(int(get(operand(0))), threads, 0, BarrierKind::kSync, site_);
    return;
  }
  if (opcode_starts("setp.")) return setp();
  if (opcode == "selp.b32" || opcode == "selp.u32")
    return set(operand(0), get(operand(get(operand(3)) ? 1 : 2)));
  if (opcode == "mov.b32" || opcode == "mov.u32" || opcode == "mov.s32" || opcode == "mov.b64")
    return set(operand(0), get(operand(1)));
  bad("unsupported instruction");
}

void Execution::mma(const MmaShape& shape) {
  uint32_t a[4], b[2];
  float c[4], d[4];
  const auto& a_operands = vector_operand(1, shape.a_registers);
  const auto& b_operands = vector_operand(2, shape.b_registers);
  const auto& c_operands = vector_operand(3, 4);
  const auto& d_operands = vector_operand(0, 4);
  for (int r = 0; r < shape.a_registers; ++r) a[r] = get_word(a_operands[r]);
  for (int r = 0; r < shape.b_registers; ++r) b[r] = get_word(b_operands[r]);
  for (int r = 0; r < 4; ++r) c[r] = get_float(c_operands[r]);
  multiply_accumulate(shape.opcode, shape.element, shape.depth, d, a, b, c, site_);
  for (int r = 0; r < 4; ++r) set_float(d_operands[r], d[r]);
}

void Execution::ldmatrix() {
  const int matrices = has("x4") ? 4 : has("x2") ? 2 : has("x1") ? 1 : 0;
  if (!matrices || !has("shared") || !has("b16")) bad("unsupported ldmatrix");
  const bool used = int(current_thread->lane) < 8 * matrices;
  const char* const row = used ? shared_pointer(uint32_t(address(1)), 16, site_) : nullptr;
  uint32_t out[4];
  load_matrices(now_->opcode.c_str(), out, matrices, has("trans"), row, site_);
  for (int m = 0; m < matrices; ++m) set(vector_operand(0, matrices)[m], out[m]);
}

void Execution::cp_async() {
  const uint32_t size = uint32_t(get(operand(2)));
  const uint32_t source_size = operand_count() > 3 ? uint32_t(get(operand(3))) : size;
  if (size != 16 && !(has("ca") && (size == 4 || size == 8))) bad("bad copy size");
  if (source_size > size) bad("src-size exceeds cp-size");
  char* const destination = shared_pointer(uint32_t(address(0)), size, site_);
  async_copy(destination, reinterpret_cast<const void*>(address(1)), size, source_size, site_);
}

void Execution::setp() {
  if (!has("s32") && !has("u32") && !has("b32")) bad("unsupported setp");
  int64_t a = int64_t(get(operand(1)) & 0xffffffffu), b = int64_t(get(operand(2)) & 0xffffffffu);
  if (has("s32")) {
    a = int32_t(a);
    b = int32_t(b);
  }
  if (!has("eq") && !has("ne") && !has("lt") && !has("le") && !has("gt") && !has("ge"))
    bad("unsupported setp");
  const bool holds = (a < b && (has("lt") || has("le") || has("ne"))) ||
                     (a == b && (has("eq") || has("le") || has("ge"))) ||
                     (a > b && (has("gt") || has("ge") || has("ne")));
  set(operand(0), holds);
}

}  // namespace ptx_interpreter

void execute_ptx(const char* text, PtxOperand* operands, int count, Site site) {
  using namespace ptx_interpreter;
  static std::unordered_map<const char*, Program> programs;  // by the literal's address
  if (!current_thread) fail("inline PTX outside a kernel", site);
  Quiet quiet;
  auto found = programs.find(text);
  if (found == programs.end()) found = programs.emplace(text, Parser(text, site).parse()).first;
  Execution(operands, count, site).run(found->second);
}

}  // namespace cuda_on_cpu
