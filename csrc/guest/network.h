/* The guest's network devices. */
#ifndef VMETTE_NETWORK_H
#define VMETTE_NETWORK_H

#include "dhcp.h"

/* Each returns NULL, or what went wrong, with errno. */

const char *loopback_up(void);

/* Brings up the network card with the address that `how` says: `dhcp`, or `dhcp,DNS` to ask another name server than the
 * answer names, or `ADDRESS/LENGTH,ROUTER,DNS`. The lease is then what is in force. */
const char *network_up(const char *how, struct lease *lease);

/* The same, of a machine that has woken: its card gets another address of its own first, and what it knew of the network
 * is forgotten. */
const char *network_again(const char *how, struct lease *lease);

#endif
