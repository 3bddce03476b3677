/* The only program of the tests' guest: fills memory with what cannot be compressed, then counts aloud. No C library. */
#ifndef MEBIBYTES
#define MEBIBYTES 32
#endif

/* Nobody reads it: without `volatile` nobody would write it either. */
static volatile unsigned long memory[MEBIBYTES * 1024UL * 1024 / 8];
static unsigned long counter;

static long call(long number, long a, long b, long c) {
  long result;
  __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
  return result;
}

static void say(unsigned long value) {
  char text[24];
  int at = sizeof text;
  text[--at] = '\n';
  do text[--at] = '0' + value % 10;
  while (value /= 10);
  text[--at] = '=';
  text[--at] = 'n';
  call(1, 1, (long)(text + at), sizeof text - at);
}

void _start(void) {
  unsigned long seed = 1;
  for (unsigned long i = 0; i < sizeof memory / sizeof *memory; i++) {
    seed = seed * 6364136223846793005UL + 1442695040888963407UL;
    memory[i] = seed;
  }
  for (;;) {
    long pause[2] = {0, 50000000};
    say(++counter);
    call(35, (long)pause, 0, 0);
  }
}
