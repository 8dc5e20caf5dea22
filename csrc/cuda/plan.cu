// The tables of sizes.

#include "plan.h"

#include <algorithm>

#include "reduce.cuh"
#include "target.cuh"
#include "workspace.h"

namespace ce::cuda {
namespace {

// How many threads take part in a row.
struct Sharing {
  int64_t pieces;        // that a thread of a warp should have of it: what a row costs besides is then little
  int64_t warp_row;      // rows up to this many pieces take a warp or less, longer ones a whole block,
  int small_block;       // of at least so many threads,
  int64_t block_pieces;  // each of which should have so many pieces
};
constexpr int kSmallBlock = 128;
constexpr Sharing kForward{128, 2048, kSmallBlock, 8};
constexpr Sharing kForwardGrad{16, 1024, kSmallBlock, 12};
constexpr Sharing kBackward{8, 256, 64, 8};
constexpr int kFewLanes = 4;
// Rows of up to so many pieces are read before it is known whether they are ignored.
constexpr int64_t kShortRow = 512;
// Where there are fewer threads than this for each multiprocessor, more take part in a row,
constexpr int64_t kBusy = 512;
// as long as each has this many pieces.
constexpr int64_t kFewPieces = 4;
// Bytes of a row that a block keeps at most if it can share the row with others: three such blocks fit a
// multiprocessor, so that one reads while another writes. Longer rows are cut into parts of at most kPart, of which
// more fit, unless that takes large clusters, which leave many multiprocessors idle.
constexpr int64_t kBlockKeeps = 72 << 10;
constexpr int64_t kPart = 50 << 10;
constexpr int kLargeCluster = 8;
// Parts of up to so many bytes take small blocks.
constexpr int64_t kSmallPart = 40 << 10;
// The same of all rows of a block that has several.
constexpr int64_t kRowsKeep = 72 << 10;
// Rows that need not be kept are shared by blocks until a thread has at most so many pieces.
constexpr int64_t kMostPieces = 16;
// Threads of a multiprocessor that run at a time in the backward pass.
constexpr int64_t kResident = 1024;
// Bundles of a block, at least: with them it reads so many times sixteen bytes at a time.
constexpr int kFewBundles = 4;
// Where a thread keeps all classes of its bundle without a gradient too, it has up to so many.
constexpr int64_t kFewClasses = 32;
// A row that has a multiprocessor to itself is shared as long as each thread has at least so many pieces.
constexpr int64_t kWorthSharing = 8;

int64_t power_of_two(int64_t at_least) {
  int64_t power = 1;
  while (power < at_least) {
    power *= 2;
  }
  return power;
}

int64_t size_of(DType dtype) {
  return dispatch(dtype, [](auto element) -> int64_t { return sizeof(element); });
}

int64_t pieces_of(const Problem& p) {
  return walks_along(p) ? p.classes * size_of(p.dtype) / 16 : p.classes;
}

static_assert(sizeof(RowDivergence<double>) <= kLargestState && sizeof(RowStats<double>) <= kLargestState);

// Bytes of what a thread has of a row, in the widest type.
int64_t state_size(const Problem& p) {
  return p.target_type == TargetType::kTeacher ? sizeof(RowDivergence<double>)
         : has_stats(p)                        ? sizeof(RowStats<double>)
                                               : sizeof(RowState<double>);
}

// Whether sixteen bytes of a class are those of neighbouring rows, wherever they are.
template <typename Pointer>
bool lies_in_bundles(const Problem& p, const Operand<Pointer>& operand, int64_t bundle) {
  bool result = reinterpret_cast<uintptr_t>(operand.data) % 16 == 0 && operand.strides[p.dims - 1] == 1 &&
                operand.class_stride % bundle == 0 && p.sizes[p.dims - 1] % bundle == 0;
  for (int d = 0; d < p.dims - 1; ++d) {
    result &= operand.strides[d] % bundle == 0;
  }
  return result;
}

// As many rows as a bundle has, or 1 where they are not taken in bundles.
int bundle_of(const Problem& p) {
  const int bundle = static_cast<int>(16 / size_of(p.dtype));
  const bool is_one = bundle > 2 && p.classes <= std::numeric_limits<int32_t>::max() && !walks_along(p) &&
                      has_indices(p) && !is_general_backward(p) && !has_stats(p) &&
                      lies_in_bundles(p, p.logits, bundle) && (!p.grad.data || lies_in_bundles(p, p.grad, bundle));
  return is_one ? bundle : 1;
}

// Lanes for a bundle, up to as many as leave a block `kFewBundles`.
Plan plan_bundles(const Problem& p, const Device& device, int bundle) {
  Plan plan;
  plan.bundle = bundle;
  plan.threads = kBundleThreads;
  plan.lanes = 1;
  while (plan.rows() > kFewBundles && p.rows / bundle * plan.lanes < kBusy * device.multiprocessors &&
         p.classes >= 2 * plan.lanes * kFewPieces) {
    plan.lanes *= 2;
  }
  return plan;
}

Plan plan_forward_bundles(const Problem& p, const Device& device, int bundle) {
  Plan plan = plan_bundles(p, device, bundle);
  const auto keep = [&] {
    Plan keeping = plan;
    keeping.kept = static_cast<int>((p.classes + plan.lanes - 1) / plan.lanes);
    keeping.sums = true;  // as it may turn out
    plan.kept = memory_of_bundles(p, keeping) <= device.shared_memory ? keeping.kept : 0;
  };
  if (p.grad.data) {
    while (plan.rows() > kFewBundles && p.classes * plan.rows() * 16 > kRowsKeep) {
      plan.lanes *= 2;
    }
    keep();
  } else if (plan.lanes == 1 && p.classes <= kFewClasses) {
    keep();
  } else {
    const int64_t tiles = (p.rows / bundle + plan.rows() - 1) / plan.rows();
    while (tiles * plan.blocks < device.multiprocessors && 2 * p.rows * plan.blocks <= kMaxParts &&
           p.classes >= 2 * kWorthSharing * plan.lanes * plan.blocks) {
      plan.blocks *= 2;
    }
  }
  plan.reads_all = p.classes <= kShortRow;
  return plan;
}

// Lanes for a row, blocks for few rows.
Plan plan_threads(const Problem& p, const Device& device, const Sharing& sharing) {
  const int64_t pieces = pieces_of(p);
  Plan plan;
  if (walks_along(p)) {
    plan.lanes = static_cast<int>(
        std::clamp<int64_t>(power_of_two((pieces + sharing.pieces - 1) / sharing.pieces), kFewLanes, kWarp));
    const auto is_idle = [&] { return p.rows * plan.lanes < kBusy * device.multiprocessors; };
    while (plan.lanes < kWarp && is_idle() && pieces >= 2 * plan.lanes * kFewPieces) {
      plan.lanes *= 2;
    }
    const int64_t idle_pieces = 2 * kFewPieces;
    if (pieces > sharing.warp_row || (pieces >= kWarp * idle_pieces && is_idle())) {
      const int64_t threads = power_of_two(pieces / (is_idle() ? idle_pieces : sharing.block_pieces));
      plan.threads = static_cast<int>(std::clamp<int64_t>(threads, sharing.small_block, kMaxThreads));
      plan.lanes = plan.threads;
    }
  } else if (std::abs(p.logits.class_stride) < std::abs(p.logits.strides[p.dims - 1])) {
    // Neighbouring classes are nearer than neighbouring rows.
    plan.threads = plan.lanes = static_cast<int>(std::clamp<int64_t>(power_of_two(p.classes), kWarp, plan.threads));
  } else {
    // A warp takes neighbouring rows; the warps of a block share them if there are too few rows otherwise.
    const int64_t line = power_of_two(p.sizes[p.dims - 1]);
    const bool few = p.rows < int64_t{2} * plan.threads * device.multiprocessors && p.classes > kWarp;
    plan.lanes = plan.threads /
                 static_cast<int>(std::clamp<int64_t>(few ? std::min<int64_t>(line, kWarp) : line, 1, plan.threads));
    plan.lanes = static_cast<int>(std::min(int64_t{plan.lanes}, power_of_two(p.classes)));
  }
  const int64_t tiles = (p.rows + plan.rows() - 1) / plan.rows();
  while (tiles * plan.blocks < device.multiprocessors && 2 * p.rows * plan.blocks <= kMaxParts &&
         plan.lanes == plan.threads && pieces / (int64_t{plan.lanes} * plan.blocks) >= 2 * kWorthSharing) {
    plan.blocks *= 2;
  }
  return plan;
}

}  // namespace

Plan plan_forward(const Problem& p, const Device& device) {
  if (const int bundle = bundle_of(p); bundle > 1) {
    return plan_forward_bundles(p, device, bundle);
  }
  Plan plan = plan_threads(p, device, p.grad.data ? kForwardGrad : kForward);
  const bool along = walks_along(p);
  const int64_t pieces = pieces_of(p);
  const int64_t bytes = p.classes * size_of(p.dtype);
  if (along && plan.lanes < plan.threads) {
    const int64_t most = p.grad.data ? kRowsKeep : 0;  // without a gradient small blocks are the faster ones
    while (plan.threads > kSmallBlock && plan.rows() * bytes > most) {
      plan.threads /= 2;
    }
  } else if (along && p.grad.data) {
    const auto part = [&] { return bytes / plan.blocks; };
    if (part() > kBlockKeeps) {
      while (plan.blocks < device.max_cluster && part() > (plan.blocks < kLargeCluster ? kPart : kBlockKeeps)) {
        plan.blocks *= 2;
      }
      plan.threads = plan.lanes = part() > kSmallPart ? kMaxThreads : kSmallBlock;
    }
  }
  plan.reads_all = pieces <= kShortRow;
  plan.cluster = along && plan.blocks > 1 && plan.blocks <= device.max_cluster;
  if (p.grad.data && (plan.blocks == 1 || plan.cluster)) {
    const int64_t ranks = int64_t{plan.lanes} * plan.blocks;
    const int64_t kept = (pieces + ranks - 1) / ranks;
    const int64_t bytes_kept = kept * (along ? 16 : size_of(p.dtype)) * plan.threads;
    const int64_t states = along ? plan.threads / kWarp + 1 : plan.threads;
    const int64_t others =
        states * state_size(p) + Exchange<double>::bytes(plan) + plan.rows() * static_cast<int64_t>(sizeof(RowSums));
    if (bytes_kept + others <= device.shared_memory) {
      plan.kept = static_cast<int>(kept);
    }
  }
  return plan;
}

bool has_gradient_pass(const Problem& p, const Plan& plan) {
  const bool copies = (walks_along(p) && !is_general(p) && p.target_type != TargetType::kTeacher) || plan.bundle > 1;
  return merges_parts(plan) || (copies && plan.kept == 0);
}

Plan plan_backward(const Problem& p, const Device& device) {
  if (const int bundle = bundle_of(p); bundle > 1) {
    return plan_bundles(p, device, bundle);
  }
  Plan plan = plan_threads(p, device, kBackward);
  if (!walks_along(p) || is_general_backward(p)) {
    return plan;
  }
  if (plan.lanes < plan.threads) {
    plan.threads = kSmallBlock;
    plan.tiles = device.multiprocessors * kResident / plan.threads;
  } else {
    while (pieces_of(p) > kMostPieces * plan.threads * plan.blocks) {
      plan.blocks *= 2;
    }
  }
  return plan;
}

}  // namespace ce::cuda
