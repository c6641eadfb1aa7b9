// A CPU and a Linux with AMX, for a file that asks for it: included before all else.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace amx_emulation {
// AMX_EMULATION=no-tile, no-bf16 or refused: what is missing.
int cpuid(unsigned leaf, unsigned sub, unsigned* eax, unsigned* ebx, unsigned* ecx, unsigned* edx);
long arch_prctl(long number, long code, long feature);
}  // namespace amx_emulation

#define __get_cpuid_count amx_emulation::cpuid
#define syscall amx_emulation::arch_prctl
