#include "tile.h"

namespace ce::cpu {
namespace {

// Lanes across rows need about half a vector of neighbouring rows to be worth it.
constexpr int64_t kWorthALine = 8;

}  // namespace

Tiling::Tiling(const Problem& p, int vector_lanes) {
  line = p.sizes[p.dims - 1];
  along = line < kWorthALine || (p.logits.class_stride == 1 && p.classes > kNarrow * vector_lanes);
  lanes = along ? 1 : vector_lanes;
  tiles_per_line = (line + lanes - 1) / lanes;
  tiles = p.rows / line * tiles_per_line;
  pieces = (p.classes + kPiece - 1) / kPiece;
}

template <typename A>
TileTargets<A>::TileTargets(const Problem& p, Tile tile) : any_kept(false) {
  const A* weights = static_cast<const A*>(p.weight);
  const RowOffsets offsets(p, tile, p.target.strides);
  const bool are_indices = has_indices(p);
  for (int lane = 0; lane < tile.rows; ++lane) {
    int64_t target = -1;
    kept[lane] = true;
    if (are_indices) {
      target = read_index(p, offsets.of(lane));
      kept[lane] = target != p.ignore_index;
    } else if (p.target_type == TargetType::kTeacher || p.picks > 0) {
      kept[lane] = counts<A>(p, tile.row + lane);
    }
    index[lane] = kept[lane] && are_indices ? own_class(p, target) : -1;
    weight[lane] = index[lane] >= 0 && weights ? weights[index[lane]] : A(1);
    any_kept |= kept[lane];
  }
}

template TileTargets<float>::TileTargets(const Problem&, Tile);
template TileTargets<double>::TileTargets(const Problem&, Tile);

}  // namespace ce::cpu
