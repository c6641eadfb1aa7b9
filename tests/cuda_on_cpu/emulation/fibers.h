// The threads of a block as fibers: each runs until it waits, so that one CPU thread runs a whole block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulated {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kLaneBytes = 64;  // max bytes that a lane exchanges

// kEager: the first thread that can run, always, so that a warp runs ahead of the next ones until it has to wait.
enum class Order { kForward, kReversed, kRandom, kEager };

// Set the scheduling order of the threads of a block; the seed is for kRandom.
void set_order(Order order, uint64_t seed);

// Run `body` once per thread.
// Throws std::runtime_error on deadlock and on divergent barriers.
void run_block(int threads, const std::function<void()>& body);

// threadIdx.x of the running thread.
int thread_number();

// Block barrier; all threads must wait at the same line.
void wait_for_block(const char* file, int line);

// Wait until a condition holds, which other threads may bring about. It is asked whenever the thread could run.
void wait_until(const std::function<bool()>& condition, const char* file, int line);

// Exchange `bytes` with the warp; all 32 lanes must wait at the same line. Return the lanes' bytes, lane l's at
// result + l * kLaneBytes; valid until the second next exchange.
const std::byte* wait_for_warp(const void* shown, size_t bytes, const char* file, int line);

}  // namespace emulated
