/* What a guest is given before its commands run: the functions `secret`, `ca-certs` and `clock` (builtins.h). */
#ifndef VMETTE_PROVISION_H
#define VMETTE_PROVISION_H

#include <stdint.h>

void give_secret(const char *name, const char *user);
void trust_certificates(void);
void set_clock(uint64_t nanoseconds); /* since the epoch */

#endif
