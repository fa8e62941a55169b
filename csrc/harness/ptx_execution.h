// The state of one inline PTX statement while it executes, and the parsed program it follows.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "harness/instructions.h"

namespace cuda_on_cpu::ptx_interpreter {

using std::string;
using std::vector;

struct Operand {
  enum Kind { kArgument, kLiteral, kRegister, kVector, kMemory, kSink } kind;
  int argument = 0;       // kArgument: N of %N
  uint64_t literal = 0;   // kLiteral: its value; kMemory: the offset
  string name;            // kRegister
  vector<Operand> parts;  // kVector: the elements; kMemory: the base, then what
                          // follows at a comma
};

struct MmaShape {
  const char* opcode;
  MmaElement element;
  int depth, a_registers, b_registers;
};

struct Instruction {
  string predicate;  // empty: always executed
  bool negated = false;
  string opcode;
  vector<string> modifiers;  // the opcode, split at its dots
  vector<Operand> operands;
  const MmaShape* mma = nullptr;  // of most instructions that are executed: told apart by comparing once
};

struct Program {
  vector<Instruction> instructions;
  std::map<string, size_t> labels;  // number of the instruction that follows
};

class Execution {
 public:
  Execution(PtxOperand* arguments, int count, Site site)
      : arguments_(arguments), count_(count), site_(site) {}

  void run(const Program& program) {
    for (size_t next = 0; next < program.instructions.size();) {
      now_ = &program.instructions[next++];
      if (!now_->predicate.empty()) {
        const bool holds = registers_value(now_->predicate) != 0;
        if (holds == now_->negated) continue;
      }
      if (now_->mma) {
        mma(*now_->mma);
      } else if (now_->opcode == "bra" || now_->opcode == "bra.uni") {
        const auto target = program.labels.find(operand(0).name);
        if (target == program.labels.end()) bad("unknown label " + operand(0).name);
        next = target->second;
      } else if (!step_sm90()) {
        step();
      }
    }
  }

 private:
  [[noreturn]] void bad(const string& what) { fail(("PTX: " + what + ": " + now_->opcode).c_str(), site_); }
  bool has(const char* modifier) const {
    for (const string& m : now_->modifiers) {
      if (m == modifier) return true;
    }
    return false;
  }
  bool opcode_starts(const char* prefix) const {
    return now_->opcode.compare(0, strlen(prefix), prefix) == 0;
  }

  size_t operand_count() const { return now_->operands.size(); }
  const Operand& operand(size_t k) {
    if (k >= operand_count()) bad("missing operand");
    return now_->operands[k];
  }
  const vector<Operand>& vector_operand(size_t k, int length) {
    if (operand(k).kind != Operand::kVector || int(operand(k).parts.size()) != length) {
      bad("vector operand " + std::to_string(k) + " must have " + std::to_string(length) + " elements");
    }
    return operand(k).parts;
  }
  uint64_t registers_value(const string& name) {
    const auto found = registers_.find(name);
    if (found == registers_.end()) bad("undefined register " + name);
    return found->second;
  }
  PtxOperand& argument(const Operand& o) {
    if (o.argument < 0 || o.argument >= count_) bad("operand number out of range");
    return arguments_[o.argument];
  }
  uint64_t get(const Operand& o) {
    switch (o.kind) {
      case Operand::kArgument:
        return argument(o).bits;
      case Operand::kLiteral:
        return o.literal;
      case Operand::kRegister:
        return registers_value(o.name);
      case Operand::kMemory:
        return get(o.parts[0]) + o.literal;
      default:
        bad("operand cannot be read");
    }
  }
  uint64_t address(size_t k) {
    if (operand(k).kind != Operand::kMemory) bad("operand " + std::to_string(k) + " must be an address");
    return get(operand(k));
  }
  void set(const Operand& o, uint64_t bits) {
    if (o.kind == Operand::kRegister) {
      registers_[o.name] = bits;
    } else if (o.kind == Operand::kArgument) {
      PtxOperand& target = argument(o);
      if (!target.writable) bad("writes an input operand");
      target.bits = bits;
      memcpy(target.variable, &bits, target.size);
    } else if (o.kind != Operand::kSink) {
      bad("operand cannot be written");
    }
  }
  void want_constraint(const Operand& o, char constraint) {
    if (o.kind == Operand::kArgument && argument(o).constraint != constraint) {
      bad(string("operand constraint must be \"") + constraint + "\"");
    }
  }
  float get_float(const Operand& o) {
    want_constraint(o, 'f');
    const uint32_t bits = uint32_t(get(o));
    float value;
    memcpy(&value, &bits, 4);
    return value;
  }
  void set_float(const Operand& o, float value) {
    want_constraint(o, 'f');
    uint32_t bits;
    memcpy(&bits, &value, 4);
    set(o, bits);
  }
  uint32_t get_word(const Operand& o) {
    want_constraint(o, 'r');
    return uint32_t(get(o));
  }

  void step();
  void mma(const MmaShape& shape);
  void ldmatrix();
  void cp_async();
  void setp();
  // ptx_interpreter_sm90.cpp. False: not an instruction of sm_90.
  bool step_sm90();
  uint64_t* memory_barrier(size_t k);
  void mbarrier();
  void elect();
  void copy_tensor_box();
  void wgmma();

  PtxOperand* arguments_;
  int count_;
  Site site_;
  const Instruction* now_ = nullptr;
  std::map<string, uint64_t> registers_;
};

}  // namespace cuda_on_cpu::ptx_interpreter
