/* The instructions of AVX-VNNI for processors without them, as a library to preload: an illegal instruction that is one
 * of them is computed on the registers that the signal saved, and the program goes on behind it.  Every one costs
 * microseconds, which is enough for tests.  See check_avxvnni.sh.
 *
 *   vpdpbusd ymm, ymm, ymm/m256    VEX.256.66.0F38.W0 50 /r    sums of four unsigned times signed bytes, in 32 bits
 *   vpdpwssd ymm, ymm, ymm/m256    VEX.256.66.0F38.W0 52 /r    sums of two products of signed words
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

enum { kXsaveHeader = 512, kUpperHalves = 576, kAvxState = 6 };  /* of the standard format of XSAVE */

static const int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                   REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

static void load(const uint8_t* state, int number, uint8_t* ymm) {
  memcpy(ymm, ((const struct _libc_fpstate*)state)->_xmm + number, 16);
  memcpy(ymm + 16, state + kUpperHalves + 16 * number, 16);
}

static void store(uint8_t* state, int number, const uint8_t* ymm) {
  memcpy(((struct _libc_fpstate*)state)->_xmm + number, ymm, 16);
  memcpy(state + kUpperHalves + 16 * number, ymm + 16, 16);
}

/* The operand behind ModRM, and how many bytes describe it. */
static int load_operand(const uint8_t* code, int base_bit, int index_bit, const greg_t* gregs, const uint8_t* state,
                        uint64_t after_disp0, uint8_t* ymm) {
  const int mode = code[0] >> 6, rm = code[0] & 7;
  if (mode == 3) {
    load(state, rm | base_bit << 3, ymm);
    return 1;
  }
  int length = 1, has_base = 1, base = rm | base_bit << 3;
  uint64_t address = 0;
  if (rm == 4) {
    const int sib = code[length++], index = (sib >> 3 & 7) | index_bit << 3;
    base = (sib & 7) | base_bit << 3;
    has_base = !((sib & 7) == 5 && mode == 0);
    if (index != 4) address += (uint64_t)gregs[kRegisters[index]] << (sib >> 6);
  }
  const int from_rip = rm == 5 && mode == 0, wide = mode == 2 || from_rip || !has_base;
  int32_t wide_disp = 0;
  if (wide) memcpy(&wide_disp, code + length, 4);
  if (wide) address += (uint64_t)(int64_t)wide_disp;
  if (mode == 1) address += (uint64_t)(int64_t)(int8_t)code[length];
  length += wide ? 4 : mode == 1 ? 1 : 0;
  if (from_rip) {
    address += after_disp0 + (uint64_t)length;
  } else if (has_base) {
    address += (uint64_t)gregs[kRegisters[base]];
  }
  memcpy(ymm, (const void*)(uintptr_t)address, 32);
  return length;
}

static uint32_t dot(int opcode, const uint8_t* a, const uint8_t* b) {
  int64_t sum = 0;
  if (opcode == 0x50) {
    for (int i = 0; i < 4; ++i) sum += (int)a[i] * (int8_t)b[i];
  } else {
    int16_t words[4];
    memcpy(words, a, 4);
    memcpy(words + 2, b, 4);
    sum = (int64_t)words[0] * words[2] + (int64_t)words[1] * words[3];
  }
  return (uint32_t)sum;
}

static void on_illegal_instruction(int number, siginfo_t* info, void* context) {
  (void)info;
  mcontext_t* machine = &((ucontext_t*)context)->uc_mcontext;
  uint8_t* state = (uint8_t*)machine->fpregs;
  const uint8_t* code = (const uint8_t*)(uintptr_t)machine->gregs[REG_RIP];
  /* 3-byte VEX, 0F38; W0, 256 bits, 66 */
  const int known = code[0] == 0xc4 && (code[1] & 0x1f) == 2 && (code[2] & 0x87) == 0x05;
  if (!known || (code[3] != 0x50 && code[3] != 0x52)) {
    signal(number, SIG_DFL);  /* and the instruction, tried again, ends the program */
    return;
  }
  uint64_t features;
  memcpy(&features, state + kXsaveHeader, 8);
  if ((features & 4) == 0) memset(state + kUpperHalves, 0, 256);
  features |= kAvxState;
  memcpy(state + kXsaveHeader, &features, 8);

  const int target = (code[4] >> 3 & 7) | (code[1] & 0x80 ? 0 : 8);
  uint8_t sum[32], a[32], b[32];
  load(state, target, sum);
  load(state, ~code[2] >> 3 & 15, a);
  const int length = load_operand(code + 4, (code[1] & 0x20) == 0, (code[1] & 0x40) == 0, machine->gregs, state,
                                  (uint64_t)machine->gregs[REG_RIP] + 4, b);
  for (int lane = 0; lane < 32; lane += 4) {
    uint32_t value;
    memcpy(&value, sum + lane, 4);
    value += dot(code[3], a + lane, b + lane);
    memcpy(sum + lane, &value, 4);
  }
  store(state, target, sum);
  machine->gregs[REG_RIP] += 4 + length;
}

__attribute__((constructor)) static void install(void) {
  struct sigaction action = {.sa_sigaction = on_illegal_instruction, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigaction(SIGILL, &action, NULL);
}
