/* The frequency of the clock that an emulated x86 guest sees as its time-stamp counter. */
#ifndef VMETTE_TSC_H
#define VMETTE_TSC_H

#include <stdint.h>

/* In kHz. QEMU without acceleration passes the host's own counter through, or nanoseconds where the host has none that
 * it knows. Measuring takes about 3 ms and is good to some tens of ppm. Returns 0 if it cannot be measured. */
uint32_t vmette_tsc_khz(void);

#endif
