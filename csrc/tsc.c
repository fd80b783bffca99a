#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "tsc.h"

#include <time.h>

#if defined(__x86_64__)
#include <x86intrin.h>

enum { TRIES = 8, INTERVAL_NS = 5000000 };

struct instant {
    int64_t ns;
    uint64_t ticks;
};

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* The two clocks at one time: of several tries, the one that was interrupted least between them. */
static struct instant take(void) {
    struct instant best = {0};
    int64_t narrowest = INT64_MAX;
    for (int i = 0; i < TRIES; i++) {
        int64_t before = now_ns();
        uint64_t ticks = __rdtsc();
        int64_t width = now_ns() - before;
        if (width < narrowest) {
            narrowest = width;
            best = (struct instant){before + width / 2, ticks};
        }
    }
    return best;
}

uint32_t vmette_tsc_khz(void) {
    struct instant start = take();
    struct timespec interval = {.tv_nsec = INTERVAL_NS};
    nanosleep(&interval, NULL);
    struct instant end = take();
    if (end.ns <= start.ns || end.ticks <= start.ticks) return 0;
    double khz = (double)(end.ticks - start.ticks) * 1e6 / (double)(end.ns - start.ns);
    return khz < 1e9 ? (uint32_t)(khz + 0.5) : 0;
}
#else
uint32_t vmette_tsc_khz(void) { return 1000000; }
#endif
