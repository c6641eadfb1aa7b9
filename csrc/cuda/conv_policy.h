// How the deformable convolution's forward pass runs on a device: tile, stages, blocks, splits and tables, chosen here
// and nowhere else.
#pragma once

#include <algorithm>

#include "deform_conv.h"

namespace bkd {

// A tile of kM pixels and kN outputs. Kernels ask for what depends on the architecture and the bytes of a number.
template <int kM, int kN>
struct ConvPolicy {
  static constexpr int kStages = 2;                                     // of the weights, as of the samples
  static constexpr int kBlocks = kN > 128 ? 1 : kM + kN > 128 ? 2 : 3;  // on a multiprocessor
  static constexpr int kStageBytes = 64 * kStages * (kM + kN);
  static constexpr int kTableBytes = 32 * kM;  // of the neighbours of one tap

  // From 10.0 the compiler needs more registers for float32, and would spill.
  static constexpr bool is_tight(int architecture, int bytes) { return architecture >= 1000 && bytes == 4; }
  static constexpr int blocks(int architecture, int bytes, bool tensor) {
    if (architecture < 800 && kM == 128) return 1;  // Turing has half the registers
    return is_tight(architecture, bytes) && (kM == kN || !tensor) ? kBlocks - 1 : kBlocks;
  }
  // Chunks of a thread that are loaded together.
  static constexpr int in_flight(int architecture, int bytes) {
    return (kN > 128 || kM > kN) && !is_tight(architecture, bytes) ? 2 : 1;
  }
};

// Plan for a tile. needed: tables of the taps of a part and an offset group. As many blocks share a multiprocessor as
// leave two tables.
template <int kM, int kN>
ConvPlan plan_tile(int parts, int needed, const Device& device) {
  using Policy = ConvPolicy<kM, kN>;
  int tables = 0;
  for (int blocks = Policy::kBlocks; blocks > 0 && tables < std::min(needed, 2); --blocks) {
    const int shared = std::min(device.shared_per_block, device.shared / blocks - 1024);  // 1 KB is the system's
    tables = (shared - Policy::kStageBytes) / Policy::kTableBytes;
  }
  tables = std::max(tables, 1);
  const int windows = (needed + tables - 1) / tables;
  tables = (needed + windows - 1) / windows;
  return {kM, kN, parts, tables, Policy::kStageBytes + tables * Policy::kTableBytes};
}

// tensor: products run on tensor cores.
inline ConvPlan plan_conv(const DeformConv& p, bool tensor, const Device& device) {
  const int outputs = p.group_outputs, processors = device.multiprocessors;
  const auto tiles = [&](int64_t rows, int64_t columns) {
    return (p.pixels + rows - 1) / rows * p.groups * ((outputs + columns - 1) / columns);
  };
  // Large tiles sample and load least. They take nine tenths of the device or more.
  const auto fills = [&](int rows, int columns, int blocks) {
    return 10 * tiles(rows, columns) >= int64_t{9} * processors * blocks;
  };
  const int needed = p.sampling.taps;
  using Largest = ConvPolicy<128, 256>;
  if (tensor && outputs > 128 && device.shared_per_block >= Largest::kStageBytes + 9 * Largest::kTableBytes &&
      fills(128, 256, Largest::kBlocks)) {
    return plan_tile<128, 256>(1, needed, device);
  }
  if (outputs > 64 && fills(128, 128, ConvPolicy<128, 128>::kBlocks)) return plan_tile<128, 128>(1, needed, device);
  if (outputs <= 64 && fills(128, 64, ConvPolicy<128, 64>::kBlocks)) return plan_tile<128, 64>(1, needed, device);
  // Small tiles, and where these leave multiprocessors idle, a split depth of at least kMinDepth numbers a part.
  constexpr int kMinDepth = 128;
  const int64_t blocks = std::max<int64_t>(1, outputs > 64 ? tiles(64, 128) : tiles(64, 64));
  const int64_t depth = int64_t{p.group_channels} * p.sampling.taps;
  const int64_t wanted = std::min((2 * processors + blocks - 1) / blocks, depth / kMinDepth);
  const int parts = static_cast<int>(std::max<int64_t>(1, wanted));
  const int offset_groups = std::min((p.group_channels - 1) / p.offset_channels + 2, p.offset_groups);  // of a group
  const int own = std::min(needed, (needed * offset_groups + parts - 1) / parts + 1);  // it may begin within a tap
  return outputs > 64 ? plan_tile<64, 128>(parts, own, device) : plan_tile<64, 64>(parts, own, device);
}

// Tiles of 128 pixels and kN outputs on wgmma: samples stay in registers, and shared memory has weights and tables.
template <int kN>
struct WgmmaPolicy {
  static constexpr int kM = 128, kStages = 5;
  static constexpr int kBlocks = kN > 128 ? 1 : 2;  // on a multiprocessor
  static constexpr int kStageBytes = 64 * kN;
  static constexpr int kFixedBytes = kStages * kStageBytes + 128;  // with 16 bytes of barriers for each stage
  static constexpr int kTableBytes = ConvPolicy<kM, kN>::kTableBytes;
  static_assert(16 * kStages <= 128, "barriers fit");
};

// The same tile on wgmma for two bytes a number, if it is a large one and all groups have the same steps.
inline ConvPlan plan_wgmma(const DeformConv& p, ConvPlan plan, const Device& device) {
  const auto with = [&](auto policy) {
    using Policy = decltype(policy);
    const int piece = std::min(p.group_channels, p.offset_channels);  // of channels with the same neighbours
    const int64_t steps = int64_t{p.group_channels / piece} * p.sampling.taps * ((piece + 31) / 32);
    const int64_t tiles = int64_t{p.groups} * ((p.group_outputs + plan.columns - 1) / plan.columns);
    const int shared = std::min(device.shared_per_block, device.shared / Policy::kBlocks - 1024);  // 1 KB: the system's
    const int most = (shared - Policy::kFixedBytes) / Policy::kTableBytes, needed = p.sampling.taps;
    if (most < 1) return plan;
    const int windows = (needed + most - 1) / most;
    plan.tables = (needed + windows - 1) / windows;
    plan.shared = Policy::kFixedBytes + plan.tables * Policy::kTableBytes;
    plan.arranged = steps * tiles * Policy::kStageBytes;
    return plan;
  };
  const bool nested = p.group_channels % p.offset_channels == 0 || p.offset_channels % p.group_channels == 0;
  if (plan.rows != 128 || plan.columns < 128 || plan.parts != 1 || !nested) return plan;
  return plan.columns == 256 ? with(WgmmaPolicy<256>{}) : with(WgmmaPolicy<128>{});
}

}  // namespace bkd
