/* What the C of every kernel begins with. THREADS, SHARED_BYTES, COUNTING and CODE, the length of
   its code, are defined before it. */
#include <math.h>
#include <stdint.h>
#include <string.h>

/* A register's bits as a number. The letter is the type: Float, Double, Half, Bfloat16. */
static inline float F(uint32_t x) { float y; memcpy(&y, &x, 4); return y; }
static inline double D(uint64_t x) { double y; memcpy(&y, &x, 8); return y; }
static inline float H(uint16_t x) { _Float16 y; memcpy(&y, &x, 2); return (float)y; }
static inline float B(uint16_t x) { return F((uint32_t)x << 16); }
/* A number as a register's bits, rounded to nearest even. Arithmetic makes one NaN, as on a GPU. */
static inline uint32_t f(float x) { uint32_t y; memcpy(&y, &x, 4); return x != x ? 0x7fffffff : y; }
static inline uint64_t d(double x) {
  uint64_t y; memcpy(&y, &x, 8);
  return x != x ? 0x7ff8000000000000 : y;
}
static inline uint16_t h(float x) {
  _Float16 z = x; uint16_t y; memcpy(&y, &z, 2);
  return x != x ? 0x7fff : y;
}
static inline uint16_t b(float x) {
  uint32_t y; memcpy(&y, &x, 4);
  return x != x ? 0x7fff : (y + 0x7fff + (y >> 16 & 1)) >> 16;
}

/* min and max: a NaN gives way, and -0 is less than 0. */
static inline double least(double x, double y) {
  return x != x ? y : y != y ? x : x < y || (x == y && signbit(x)) ? x : y;
}
static inline double most(double x, double y) {
  return x != x ? y : y != y ? x : x > y || (x == y && signbit(y)) ? x : y;
}
/* min.NaN and max.NaN: a NaN wins. */
static inline double least_nan(double x, double y) { return x != x || y != y ? NAN : least(x, y); }
static inline double most_nan(double x, double y) { return x != x || y != y ? NAN : most(x, y); }

/* To an integer: towards zero, saturating; a NaN becomes zero. */
static inline int64_t whole(double x, double lo, double hi) {
  return x != x ? 0 : x < lo ? lo : x > hi ? hi : x;
}

/* Four bytes chosen among the eight of two registers, or the sign of one in all its bits. */
static inline uint32_t prmt(uint32_t low, uint32_t high, uint32_t choices) {
  uint64_t bytes = (uint64_t)high << 32 | low;
  uint32_t y = 0;
  for (int i = 0; i < 4; i++) {
    uint32_t choice = choices >> 4 * i & 15, byte = bytes >> 8 * (choice & 7) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;
    y |= byte << 8 * i;
  }
  return y;
}

/* Faults. The first one ends the launch. */
enum { MISALIGNED = 1, FOREIGN, READ_ONLY, RACE, DIVERGED, BEYOND_SHARED, NO_MEMBER };
static uint64_t *fault; /* kind, index of the instruction, block, thread, address */
static int64_t cta;     /* the block that runs */
static int fail(uint64_t kind, uint64_t index, uint64_t thread, uint64_t address) {
  fault[0] = kind, fault[1] = index, fault[2] = cta, fault[3] = thread, fault[4] = address;
  return 1;
}

#if COUNTING
/* Of each instruction: blocks that ran it. Of each access to global memory also: warps in which a
   thread took part, bytes that threads asked for, and 32-byte sectors that warps touched. */
static uint64_t counts[CODE][4];
const uint64_t *counted(void) { return &counts[0][0]; }
static uint64_t places[CODE][THREADS]; /* what each thread accesses, until it is counted; or 0 */
/* Count what the threads of a block have just accessed. An access is aligned to its size, 16 bytes
   at most, so a thread touches one sector. */
static void count(uint64_t index, int bytes) {
  for (int first = 0; first < THREADS; first += 32) {
    uint64_t sectors[32];
    int num_sectors = 0, num_threads = 0;
    for (int t = first; t < first + 32 && t < THREADS; t++) {
      uint64_t sector = places[index][t] / 32;
      int i = 0;
      if (!places[index][t]) continue;
      places[index][t] = 0, num_threads++;
      while (i < num_sectors && sectors[i] != sector) i++;
      if (i == num_sectors) sectors[num_sectors++] = sector;
    }
    counts[index][1] += num_threads > 0;
    counts[index][2] += num_threads * bytes;
    counts[index][3] += num_sectors;
  }
}
#endif

static const uint64_t (*regions)[3]; /* first byte, last byte + 1, may it be written; ascending */
static int64_t num_regions;
/* Check an access to global memory; `stored` is what is written, or 0. */
static int global(const void *stored, uint64_t index, int t, uint64_t address, int bytes) {
#if COUNTING
  places[index][t] = address;
#endif
  if (address % bytes) return fail(MISALIGNED, index, t, address);
  int64_t lo = 0, hi = num_regions;
  while (hi - lo > 1) {
    int64_t middle = (lo + hi) / 2;
    *(regions[middle][0] <= address ? &lo : &hi) = middle;
  }
  if (!num_regions || address < regions[lo][0] || address + bytes > regions[lo][1])
    return fail(FOREIGN, index, t, address);
  return stored && !regions[lo][2] ? fail(READ_ONLY, index, t, address) : 0;
}

static uint8_t memory[SHARED_BYTES + 1]; /* an array of no elements is not C */
/* Of each byte, between which barriers it was last written and read, and by which thread; -1: by
   several. */
static struct { int64_t written_at, read_at; int writer, reader; } history[SHARED_BYTES + 1];
static int64_t epoch; /* counts barriers and blocks */
/* Check an access to shared memory. */
static int shared(const void *stored, uint64_t index, int t, uint32_t address, int bytes) {
  if (address % bytes) return fail(MISALIGNED, index, t, address);
  if ((uint64_t)address + bytes > SHARED_BYTES) return fail(BEYOND_SHARED, index, t, address);
  for (uint32_t i = address; i < address + bytes; i++) {
    int written = history[i].written_at == epoch, read = history[i].read_at == epoch;
    int others = written && history[i].writer != t;
    if (stored) {
      /* Several threads may write the same value. */
      int same = ((const uint8_t *)stored)[i - address] == memory[i];
      if ((others && !same) || (read && history[i].reader != t))
        return fail(RACE, index, t, address);
      history[i].writer = others ? -1 : t, history[i].written_at = epoch;
    } else {
      if (others) return fail(RACE, index, t, address);
      history[i].reader = read && history[i].reader != t ? -1 : t, history[i].read_at = epoch;
    }
  }
  return 0;
}
