// The instruction sets that the kernels are compiled for, and the one that the running processor gets.
#pragma once

namespace ce::cpu {

enum class Isa { kPortable, kAvx2, kAvx512 };

// The widest that the processor has; the environment variable CROSS_ENTROPY_ISA (portable, avx2, avx512) lowers it.
Isa isa();
const char* isa_name();

// Whether a core reads memory faster from eight pages in turn than from one after the other: Intel's do, by a third;
// AMD's lose a quarter. The environment variable CROSS_ENTROPY_STRIPES (0, 1) decides otherwise.
bool reads_in_stripes();

}  // namespace ce::cpu
