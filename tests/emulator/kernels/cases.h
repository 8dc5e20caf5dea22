// Lists of cases: of every layout, of every option.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "case.h"

namespace ce::test {

// Those that a group asks for, unless KERNELS_TEST_DTYPE keeps to one.
inline std::vector<DType> these_or_one(std::vector<DType> dtypes) {
  const char* const only = std::getenv("KERNELS_TEST_DTYPE");
  return only ? std::vector<DType>{static_cast<DType>(std::atoi(only))} : dtypes;
}
inline const std::vector<DType> kAllDTypes = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
inline const std::vector<DType> kTwoDTypes = {DType::kFloat32, DType::kBFloat16};

// Rows next to each other or not, classes apart, classes across rows, classes that do not count.
inline std::vector<Case> layouts(DType dtype) {
  Case contiguous;
  contiguous.dtype = dtype;
  contiguous.outer = 9;
  contiguous.classes = 45;
  Case misaligned = contiguous;
  misaligned.gap = 3;
  misaligned.offset = 1;
  misaligned.companions_lie_otherwise = true;
  Case stepped = contiguous;
  stepped.class_step = 2;
  Case columns = contiguous;
  columns.outer = 1;
  columns.inner = 70;
  columns.inner_is_last = true;
  Case segmentation = columns;
  segmentation.outer = 2;
  segmentation.inner = 37;
  segmentation.classes = 21;
  Case classes_last = segmentation;
  classes_last.inner_is_last = false;
  Case apart = segmentation;
  apart.gap = 2;
  apart.companions_lie_otherwise = true;
  Case padded = contiguous;
  padded.padding = 19;
  Case padded_columns = segmentation;
  padded_columns.padding = 3;
  return {contiguous, misaligned, stepped, columns, segmentation, classes_last, apart, padded, padded_columns};
}

// The options, in lists of cases of one shape and layout.

// The loss of torch: every combination.
inline std::vector<Case> losses(Case c) {
  std::vector<Case> list;
  for (const TargetType target : {TargetType::kInt64, TargetType::kProbabilities}) {
    for (const double smoothing : {0.0, 0.1}) {
      for (const bool weighted : {false, true}) {
        c.target = target;
        c.smoothing = smoothing;
        c.weighted = weighted;
        c.reduction = "msn"[list.size() % 3];
        c.ignores = c.has_indices();
        c.outputs = list.size() % 2 ? 0 : kLse;
        list.push_back(c);
      }
    }
  }
  return list;
}

// What goes beyond torch. Every kernel has what is plain, an index without options, and what is general, so each option
// meets both kinds of target, and the plain kernel if it can.
inline std::vector<Case> options(const Case& c) {
  Case plain = c;
  plain.ignores = plain.weighted = plain.row_weighted = true;
  plain.z_loss = 0.02;
  plain.reduction = 'm';
  Case divided = c;
  divided.ignores = divided.row_weighted = divided.on_device = true;
  divided.reduction = 'd';
  Case scaled = c;
  scaled.ignores = true;
  scaled.logit_scale = 0.7;
  scaled.z_loss = 0.01;
  scaled.outputs = kLse;
  scaled.reduction = 's';
  Case capped = plain;
  capped.softcap = 4;
  capped.logit_scale = 1.3;
  capped.on_device = true;
  capped.smoothing = 0.1;
  Case mixed = c;
  mixed.target = TargetType::kProbabilities;
  mixed.weighted = mixed.row_weighted = true;
  mixed.smoothing = 0.2;
  mixed.softcap = 6;
  mixed.z_loss = 0.02;
  mixed.logit_scale = -0.8;
  mixed.reduction = 'm';
  Case mixed_divided = c;
  mixed_divided.target = TargetType::kProbabilities;
  mixed_divided.logit_scale = 1.2;
  mixed_divided.row_weighted = mixed_divided.on_device = true;
  mixed_divided.outputs = kLse;
  mixed_divided.reduction = 'd';
  return {capped, mixed, plain, divided, scaled, mixed_divided};
}

// The outputs besides the loss. Ignored rows are read only for some of them.
inline std::vector<Case> stats(const Case& c) {
  Case all = c;
  all.ignores = all.has_ties = true;
  all.outputs = kAllOutputs;
  all.reduction = 'm';
  Case transformed = all;
  transformed.logit_scale = -0.7;
  transformed.softcap = 5;
  transformed.smoothing = 0.1;
  transformed.weighted = transformed.row_weighted = true;
  transformed.z_loss = 0.01;
  Case of_targets = all;
  of_targets.outputs = kLogProb | kRank;
  Case entropy = all;
  entropy.outputs = kEntropy;
  Case of_probabilities = transformed;
  of_probabilities.outputs = kEntropy | kArgmax;
  of_probabilities.target = TargetType::kProbabilities;
  of_probabilities.ignores = false;
  Case place = all;
  place.outputs = kArgmax;
  place.ignores_all = true;
  return {all, transformed, of_targets, entropy, of_probabilities, place};
}

inline std::vector<Case> teachers(Case c) {
  c.target = TargetType::kTeacher;
  Case forward = c;
  forward.reduction = 's';
  Case reverse = c;
  reverse.reverse = reverse.row_weighted = true;
  reverse.teacher_scale = 0.5;
  reverse.logit_scale = 0.5;
  reverse.reduction = 'm';
  Case cross = c;
  cross.kappa = 0;
  cross.row_weighted = true;
  cross.softcap = 5;
  cross.logit_scale = 1.2;
  cross.z_loss = 0.02;
  cross.on_device = true;
  cross.reduction = 'd';
  Case reverse_cross = cross;
  reverse_cross.reverse = true;
  reverse_cross.row_weighted = false;
  reverse_cross.reduction = 'm';
  return {reverse, cross, forward, reverse_cross};
}

inline std::vector<Case> picks(Case c) {
  c.picks = c.picks > 0 ? c.picks : c.classes * 3 / 4;
  c.row_weighted = true;
  Case dropped = c;
  dropped.z_loss = 0.02;
  dropped.reduction = 's';
  Case spread = c;
  spread.target = TargetType::kInt32;
  spread.spreads = spread.has_repeated_picks = true;
  spread.softcap = 5;
  spread.logit_scale = 1.2;
  spread.z_loss = 0.02;
  spread.reduction = 'm';
  Case cross = c;
  cross.kappa = 0;
  cross.spreads = cross.on_device = true;
  cross.logit_scale = 0.7;
  cross.reduction = 'd';
  Case repeated = c;
  repeated.target = TargetType::kInt32;
  repeated.kappa = 0;
  repeated.has_repeated_picks = true;
  repeated.row_weighted = false;
  return {spread, dropped, repeated, cross};
}

// A shard has no reduction. Ignored rows are read only for the log-sum-exp.
inline std::vector<Case> shards(Case c, int64_t number) {
  c.shards = number;
  c.ignores = true;
  Case plain = c;
  plain.z_loss = 0.02;
  Case smoothed = c;
  smoothed.target = TargetType::kInt32;
  smoothed.smoothing = 0.1;
  smoothed.weighted = true;
  smoothed.softcap = 5;
  smoothed.logit_scale = 1.2;
  smoothed.outputs = kLse;
  Case mixed = c;
  mixed.target = TargetType::kProbabilities;
  mixed.ignores = false;
  mixed.weighted = true;
  mixed.smoothing = 0.2;
  mixed.logit_scale = -0.8;
  mixed.z_loss = 0.02;
  Case bad = c;
  bad.has_bad_target = true;
  return {smoothed, plain, mixed, bad};
}

// The first cases of a list, where they have to do.
inline std::vector<Case> first(size_t count, std::vector<Case> list) {
  list.resize(std::min(count, list.size()), Case());
  return list;
}

}  // namespace ce::test
