#include "tile.h"

#include <algorithm>

namespace ce::cpu {
namespace {

// Lanes across rows need about half a vector of neighbouring rows to be worth it.
constexpr int64_t kWorthALine = 8;

// Rows with their classes next to each other are transposed, a tile at a time. Where the rows are next to each other,
// the same class of as many of them as whole cache lines hold: classes are often so far apart, at a power of two, that
// the caches have room for few of them at a time.
int tiles_to_stage(const Problem& p, const Tiling& tiling) {
  constexpr int64_t kTogether = 1 << 15, kMost = 1 << 18;  // bytes
  constexpr int64_t kLine = 4;                             // tiles of half types, at most
  if (tiling.along || tiling.pieces > 1 || p.target_type == TargetType::kTeacher) {
    return 0;
  }
  if (p.logits.class_stride == 1) {
    return 1;
  }
  const int64_t bytes = tiling.column_bytes(p);
  return bytes * kLine > kMost ? 0 : static_cast<int>(std::max<int64_t>(1, kTogether / (bytes * kLine)) * kLine);
}

}  // namespace

Tiling::Tiling(const Problem& p, int vector_lanes) {
  line = p.sizes[p.dims - 1];
  along = line < kWorthALine || (p.logits.class_stride == 1 && p.classes > kNarrow * vector_lanes);
  lanes = along ? 1 : vector_lanes;
  tiles_per_line = (line + lanes - 1) / lanes;
  tiles = p.rows / line * tiles_per_line;
  pieces = (p.classes + kPiece - 1) / kPiece;
  staged = tiles_to_stage(p, *this);
}

template <typename A>
TileTargets<A>::TileTargets(const Problem& p, const Tile& tile, int lanes) : any_kept(false) {
  const RowOffsets offsets(p, tile, p.target.strides);
  const auto take = [&](const auto& index_at) {
    for (int lane = 0; lane < tile.rows; ++lane) {
      const int64_t target = index_at(offsets.of(lane));
      kept[lane] = target != p.ignore_index;
      index[lane] = kept[lane] ? own_class(p, target) : -1;
    }
  };
  if (p.target_type == TargetType::kInt64 && has_indices(p)) {  // as most are
    take([&](int64_t offset) { return static_cast<const int64_t*>(p.target.data)[offset]; });
  } else if (has_indices(p)) {
    take([&](int64_t offset) { return read_index(p, offset); });
  } else {
    const bool may_not_count = p.target_type == TargetType::kTeacher || p.picks > 0;
    for (int lane = 0; lane < tile.rows; ++lane) {
      kept[lane] = !may_not_count || counts<A>(p, tile.row + lane);
      index[lane] = -1;
    }
  }
  const A* const weights = static_cast<const A*>(p.weight);
  for (int lane = 0; lane < tile.rows; ++lane) {
    weight[lane] = weights && index[lane] >= 0 ? weights[index[lane]] : A(1);
    any_kept |= kept[lane];
  }
  for (int lane = tile.rows; lane < lanes; ++lane) {
    kept[lane] = false;
    index[lane] = -1;
    weight[lane] = 1;
  }
}

template TileTargets<float>::TileTargets(const Problem&, const Tile&, int);
template TileTargets<double>::TileTargets(const Problem&, const Tile&, int);

}  // namespace ce::cpu
