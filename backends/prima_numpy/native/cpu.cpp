#include "cpu.h"

#include <cstdint>

#ifdef PRIMA_X86
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

#if defined(PRIMA_NEON) && (defined(__aarch64__) || defined(_M_ARM64))
#define PRIMA_IS_ARM
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#endif
#endif

// The tile registers are asked for where the kernel gives them to those who ask, which is Linux only.
#if defined(PRIMA_AMX) && defined(__linux__) && !defined(PRIMA_EMULATE_TILES)
#define PRIMA_ASKS_FOR_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace prima {

namespace {

#ifdef PRIMA_X86

struct Registers {
    uint32_t a, b, c, d;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
    Registers r{};
#if defined(_MSC_VER)
    int values[4];
    __cpuidex(values, int(leaf), int(subleaf));
    r = {uint32_t(values[0]), uint32_t(values[1]), uint32_t(values[2]), uint32_t(values[3])};
#else
    __cpuid_count(leaf, subleaf, r.a, r.b, r.c, r.d);
#endif
    return r;
}

// Which register files the operating system saves: bit 2 AVX, 5-7 AVX-512, 17-18 AMX.
uint64_t saved_state() {
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    uint32_t low, high;
    __asm__ __volatile__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t(high) << 32 | low;
#endif
}

struct X86 {
    bool f16c = false, fma = false, avx2 = false, avx_vnni = false;
    bool avx512f = false, avx512dq = false, avx512bw = false, avx512vl = false;
    bool avx512vnni = false, avx512vbmi = false, avx512vbmi2 = false, avx512bitalg = false, gfni = false;
    bool avx512bf16 = false, amx_int8 = false, amx_bf16 = false;

    X86() {
        const uint32_t highest = cpuid(0, 0).a;
        if (highest < 7) return;
        const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
        const Registers seven_one = seven.a >= 1 ? cpuid(7, 1) : Registers{};
        const auto bit = [](uint32_t value, int index) { return (value >> index & 1) != 0; };
        if (!bit(one.c, 27)) return;  // no XGETBV
        const uint64_t saved = saved_state();
        const bool has_avx = (saved & 0x6) == 0x6 && bit(one.c, 28);
        const bool has_512 = has_avx && (saved & 0xe6) == 0xe6;
        const bool has_amx = (saved & 0x60000) == 0x60000;
        f16c = has_avx && bit(one.c, 29);
        fma = has_avx && bit(one.c, 12);
        avx2 = has_avx && bit(seven.b, 5);
        avx_vnni = has_avx && bit(seven_one.a, 4);
        avx512f = has_512 && bit(seven.b, 16);
        avx512dq = has_512 && bit(seven.b, 17);
        avx512bw = has_512 && bit(seven.b, 30);
        avx512vl = has_512 && bit(seven.b, 31);
        avx512vnni = has_512 && bit(seven.c, 11);
        avx512vbmi = has_512 && bit(seven.c, 1);
        avx512vbmi2 = has_512 && bit(seven.c, 6);
        avx512bitalg = has_512 && bit(seven.c, 12);
        gfni = has_avx && bit(seven.c, 8);
        avx512bf16 = has_512 && bit(seven_one.a, 5);
        amx_int8 = has_amx && bit(seven.d, 24) && bit(seven.d, 25);
        amx_bf16 = has_amx && bit(seven.d, 24) && bit(seven.d, 22);
    }
};

#endif

#ifdef PRIMA_IS_ARM

#ifdef __APPLE__
bool has(const char* feature) {
    int value = 0;
    size_t size = sizeof(value);
    return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}
#endif

// What comes on top of NEON. Numbers stand here because older headers have no names for them.
struct Arm {
    bool dotprod = false, i8mm = false;

    Arm() {
#if defined(__linux__)
        dotprod = (getauxval(AT_HWCAP) >> 20 & 1) != 0;  // HWCAP_ASIMDDP
        i8mm = (getauxval(AT_HWCAP2) >> 13 & 1) != 0;    // HWCAP2_I8MM
#elif defined(__APPLE__)
        dotprod = has("hw.optional.arm.FEAT_DotProd");
        i8mm = has("hw.optional.arm.FEAT_I8MM");
#elif defined(_WIN32)
        dotprod = IsProcessorFeaturePresent(43) != 0;  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
        i8mm = IsProcessorFeaturePresent(66) != 0;     // PF_ARM_V82_I8MM_INSTRUCTIONS_AVAILABLE
#endif
    }
};

#endif

}  // namespace

std::vector<std::pair<std::string, bool>> cpu_features() {
#ifdef PRIMA_X86
    const X86 cpu;
    return {{"f16c", cpu.f16c},
            {"fma", cpu.fma},
            {"avx2", cpu.avx2},
            {"avx_vnni", cpu.avx_vnni},
            {"avx512f", cpu.avx512f},
            {"avx512dq", cpu.avx512dq},
            {"avx512bw", cpu.avx512bw},
            {"avx512vl", cpu.avx512vl},
            {"avx512vnni", cpu.avx512vnni},
            {"avx512vbmi", cpu.avx512vbmi},
            {"avx512vbmi2", cpu.avx512vbmi2},
            {"avx512bitalg", cpu.avx512bitalg},
            {"gfni", cpu.gfni},
            {"avx512bf16", cpu.avx512bf16},
            {"amx_int8", cpu.amx_int8},
            {"amx_bf16", cpu.amx_bf16}};
#elif defined(PRIMA_IS_ARM)
    const Arm cpu;
    return {{"neon", true}, {"dotprod", cpu.dotprod}, {"i8mm", cpu.i8mm}};
#else
    return {};
#endif
}

std::vector<const Table*> usable_tables() {
    std::vector<const Table*> tables;
#ifdef PRIMA_X86
    const X86 cpu;
    const bool has_avx2 = cpu.avx2 && cpu.fma && cpu.f16c;
    const bool has_vnni =
        has_avx2 && cpu.avx512f && cpu.avx512dq && cpu.avx512bw && cpu.avx512vl && cpu.avx512vnni;
    const bool has_vbmi = has_vnni && cpu.avx512vbmi && cpu.avx512vbmi2 && cpu.avx512bitalg && cpu.gfni;
#ifdef PRIMA_AMX
#ifdef PRIMA_EMULATE_TILES
    const bool has_tiles = true;
#else
    const bool has_tiles = cpu.amx_int8;
#endif
    if (has_vbmi && has_tiles) tables.push_back(&amx_table());
#endif
    if (has_vbmi) tables.push_back(&avx512vbmi_table());
    if (has_vnni) tables.push_back(&avx512vnni_table());
#ifdef PRIMA_AVXVNNI
    if (has_avx2 && cpu.avx_vnni) tables.push_back(&avxvnni_table());
#endif
    if (has_avx2) tables.push_back(&avx2_table());
#endif
#ifdef PRIMA_IS_ARM
    const Arm cpu;
#ifdef PRIMA_NEON_I8MM
    if (cpu.i8mm && cpu.dotprod) tables.push_back(&neon_i8mm_table());
#endif
#ifdef PRIMA_NEON_DOTPROD
    if (cpu.dotprod) tables.push_back(&neon_dotprod_table());
#endif
    tables.push_back(&neon_table());
#endif
    tables.push_back(&portable_table());
    return tables;
}

bool obtain(const Table& table) {
#ifdef PRIMA_ASKS_FOR_TILES
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, and the number in XCR0
    // By its name: on another CPU, asking for the table itself would run that variant's instructions.
    if (table.name == std::string("amx")) return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    (void)table;
#endif
    return true;
}

}  // namespace prima
