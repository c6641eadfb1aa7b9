// The threads of a block as fibers: each runs until it waits for others, so that one CPU thread runs a whole block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulated {

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;
constexpr int kDeposit = 64;  // bytes that a lane shows to its warp

enum class Order { kForward, kReversed, kRandom };

// In which order the threads of a block take their turns; the seed is for kRandom.
void set_order(Order order, uint64_t seed);

// Runs `body` once for each of `threads`; returns when all have ended.
// Throws std::runtime_error where threads wait for each other for ever, or at different places.
void run_block(int threads, const std::function<void()>& body);

// The number of the running thread in its block.
int thread_number();

// Waits until every thread of the block has come to the same line.
void wait_for_block(const char* file, int line);

// Shows `bytes` to the warp, waits until all 32 lanes have come to the same line, and gives what they showed: lane l's
// at result + l * kDeposit. It stays until the warp has met twice more.
const std::byte* wait_for_warp(const void* shown, size_t bytes, const char* file, int line);

}  // namespace emulated
