#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <exception>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "fibers are switched by a few instructions of x86-64; another machine needs its own"
#endif

// Push the callee-saved registers and switch to another stack.
extern "C" void emulated_switch(void** from, void* to);
asm(R"(
.text
.globl emulated_switch
.type emulated_switch, @function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulated_switch, .-emulated_switch
)");

namespace emulated {
namespace {

constexpr size_t kStack = 256 * 1024;

enum class State { kReady, kAtBlock, kAtWarp, kUntil, kEnded };

struct Fiber {
  std::byte* stack = nullptr;
  void* top = nullptr;   // of the stack while the fiber does not run
  void* fake = nullptr;  // AddressSanitizer's
  State state = State::kEnded;
  const char* file = "";
  int line = 0;
  unsigned meetings = 0;                             // exchanges of its warp so far; two buffers alternate
  const std::function<bool()>* condition = nullptr;  // of kUntil
};

struct Warp {
  int arrived = 0;
  std::array<std::array<std::byte, kWarp * kLaneBytes>, 2> shown;
};

struct Block {
  std::vector<Fiber> fibers{kMaxThreads};
  std::array<Warp, kMaxThreads / kWarp> warps;
  int threads = 0, running = -1, alive = 0, at_block = 0;
  const std::function<void()>* body = nullptr;
  void* top = nullptr;  // of the scheduler's stack
  void* fake = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
  std::exception_ptr error;
  Order order = Order::kForward;
  std::mt19937_64 random;
} block;

void to_scheduler(bool last) {
  Fiber& fiber = block.fibers[block.running];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake, block.bottom, block.size);
#endif
  (void)last;
  emulated_switch(&fiber.top, block.top);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake, &block.bottom, &block.size);
#endif
}

void to_fiber(int number) {
  Fiber& fiber = block.fibers[number];
  block.running = number;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.fake, fiber.stack, kStack);
#endif
  emulated_switch(&block.top, fiber.top);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.fake, nullptr, nullptr);
#endif
}

void start() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.bottom, &block.size);
#endif
  try {
    (*block.body)();
  } catch (...) {
    block.error = std::current_exception();
  }
  block.fibers[block.running].state = State::kEnded;
  --block.alive;
  to_scheduler(true);
}

void prepare(Fiber& fiber) {
  if (!fiber.stack) {
    void* buffer = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffer == MAP_FAILED) throw std::bad_alloc();
    fiber.stack = static_cast<std::byte*>(buffer);
  }
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack, kStack);  // left by an unfinished run
#endif
  // Six registers and the return address; the stack is aligned as at function entry.
  auto* top = reinterpret_cast<void**>(fiber.stack + kStack) - 1;
  *--top = reinterpret_cast<void*>(&start);
  top -= 6;
  fiber.top = top;
  fiber.state = State::kReady;
  fiber.meetings = 0;
}

[[noreturn]] void report(const std::string& what) {
  std::ostringstream text;
  text << what << ':';
  int listed = 0;
  for (int number = 0; number < block.threads && listed < 8; ++number) {
    const Fiber& fiber = block.fibers[number];
    if (number && fiber.line == block.fibers[number - 1].line && fiber.state == block.fibers[number - 1].state)
      continue;
    text << " thread " << number;
    if (fiber.state == State::kEnded) {
      text << " has ended;";
    } else {
      text << " waits at " << fiber.file << ':' << fiber.line << ';';
    }
    ++listed;
  }
  throw std::runtime_error(text.str());
}

// Release the barrier if all threads have reached it.
bool release_block() {
  if (!block.at_block || block.at_block != block.alive) return false;
  // Some threads have exited: undefined on a device.
  if (block.alive != block.threads) report("divergent barrier");
  for (int number = 1; number < block.threads; ++number) {
    if (block.fibers[number].line != block.fibers[0].line) report("divergent barrier");
  }
  for (int number = 0; number < block.threads; ++number) block.fibers[number].state = State::kReady;
  block.at_block = 0;
  return true;
}

}  // namespace

void set_order(Order order, uint64_t seed) {
  block.order = order;
  block.random.seed(seed);
}

int thread_number() { return block.running; }

void run_block(int threads, const std::function<void()>& body) {
  if (threads < 1 || threads > kMaxThreads || threads % kWarp) {
    throw std::runtime_error("a block has 32 to 1024 threads, in whole warps");
  }
  block.threads = block.alive = threads;
  block.at_block = 0;
  block.body = &body;
  block.error = nullptr;
  for (Warp& warp : block.warps) warp.arrived = 0;
  std::vector<int> turns(threads);
  std::iota(turns.begin(), turns.end(), 0);
  if (block.order == Order::kReversed) std::reverse(turns.begin(), turns.end());
  for (int number = 0; number < threads; ++number) prepare(block.fibers[number]);
  while (block.alive) {
    if (block.order == Order::kRandom) std::shuffle(turns.begin(), turns.end(), block.random);
    bool progress = false;
    for (size_t turn = 0; turn < turns.size(); ++turn) {
      const int number = turns[turn];
      Fiber& fiber = block.fibers[number];
      if (fiber.state == State::kUntil && (*fiber.condition)()) fiber.state = State::kReady;
      if (fiber.state != State::kReady) continue;
      to_fiber(number);
      progress = true;
      if (block.error) std::rethrow_exception(block.error);
      if (block.order == Order::kEager) break;
    }
    if (!progress && !release_block()) report("deadlock");
  }
}

void wait_for_block(const char* file, int line) {
  Fiber& fiber = block.fibers[block.running];
  fiber.state = State::kAtBlock;
  fiber.file = file;
  fiber.line = line;
  ++block.at_block;
  to_scheduler(false);
}

void wait_until(const std::function<bool()>& condition, const char* file, int line) {
  Fiber& fiber = block.fibers[block.running];
  fiber.state = State::kUntil;
  fiber.condition = &condition;
  fiber.file = file;
  fiber.line = line;
  to_scheduler(false);
}

const std::byte* wait_for_warp(const void* shown, size_t bytes, const char* file, int line) {
  const unsigned lane = static_cast<unsigned>(block.running) % kWarp;
  const int first = block.running - static_cast<int>(lane);
  Fiber& fiber = block.fibers[block.running];
  Warp& warp = block.warps[block.running / kWarp];
  auto& slot = warp.shown[fiber.meetings++ % 2];
  std::memcpy(slot.data() + lane * kLaneBytes, shown, bytes);
  fiber.file = file;
  fiber.line = line;
  if (++warp.arrived < kWarp) {
    fiber.state = State::kAtWarp;
    to_scheduler(false);
    return slot.data();
  }
  warp.arrived = 0;
  for (int other = first; other < first + kWarp; ++other) {
    if (block.fibers[other].line != line) report("divergent warp");
    block.fibers[other].state = State::kReady;
  }
  return slot.data();
}

}  // namespace emulated
