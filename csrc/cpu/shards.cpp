#include "../shards.h"

namespace ce::cpu {

void merge_shards(const Shards& s) {
  for (int64_t row = 0; row < s.rows; ++row) {
    s.is_double ? merge_row<double>(s, row) : merge_row<float>(s, row);
  }
}

}  // namespace ce::cpu
