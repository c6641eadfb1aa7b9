// The software pipeline of a product of tiles: one loop, into which producers bring the tiles.
#pragma once

#include "tile.cuh"

namespace bkd {
namespace {

// While a step is multiplied, the copies of the next one arrive, and its samples are on their way from memory through
// registers.
//
// copy(stage, first): start the copies of the first step, or of the next one. samples: next(true) moves to the next
// step, before its copies start; fetch(turn) loads a part of it into registers, put(turn, buffer) interpolates that
// into one of two buffers.
// multiply(turn, stage, buffer): the turn's part of the product. Stages and buffers are 0 and kStage, 0 and kBuffer:
// 1, or the bytes to the second one.
template <int kStages, int kStage = 1, int kBuffer = 1, class Copy, class Samples, class Multiply>
__device__ __forceinline__ void run_pipeline(int steps, Copy copy, Samples& samples, Multiply multiply) {
  static_assert(kStages == 2, "samples are a step ahead, and so are copies");
  constexpr int kTurns = Samples::kTurns;
  if (steps == 0) return;
  copy(0, true);
  commit_copies();
#pragma unroll 1  // else its loads are in flight together, and take registers
  for (int turn = 0; turn < kTurns; ++turn) {
    samples.fetch(turn);
    samples.put(turn, 0);
  }
  int stage = 0, buffer = 0;
  const auto wait = [] {
    wait_for_copies<0>();
    __syncthreads();
  };
#pragma unroll 1
  for (int left = steps; left > 1; --left) {
    wait();
    samples.next(true);
    copy(stage ^ kStage, false);
    commit_copies();
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      samples.fetch(turn);
      multiply(turn, stage, buffer);
      samples.put(turn, buffer ^ kBuffer);
    }
    stage ^= kStage;
    buffer ^= kBuffer;
  }
  wait();  // the last step, with which no other is prepared
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) multiply(turn, stage, buffer);
}

// Samples of a product whose tiles are both copied.
struct NoSamples {
  static constexpr int kTurns = 1;
  __device__ __forceinline__ void next(bool) {}
  __device__ __forceinline__ void fetch(int) {}
  __device__ __forceinline__ void put(int, int) {}
};

}  // namespace
}  // namespace bkd
