/* Users and groups, as /etc/passwd and /etc/group have them (passwd(5), group(5)). The files are the guest's: they may
 * say anything. They are read as they are: getpwnam and its kin would ask a name service's socket first, which nobody has
 * here and which an image could fake. */
#ifndef VMETTE_ACCOUNTS_H
#define VMETTE_ACCOUNTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum { MAX_HOME = 4096 }; /* with the zero at its end */

struct user {
    uint32_t uid, gid;
    char name[256], home[MAX_HOME];
};

/* Finds a user by name, or by number where that is NULL. */
bool find_user(const char *name, uint32_t uid, struct user *user);

/* Finds a group by name. */
bool find_group(const char *name, gid_t *gid);

/* Adds the groups that the user `name` is a member of to `groups`, which has `count` already and room for `most`; returns
 * how many there are then. */
size_t find_memberships(const char *name, gid_t *groups, size_t count, size_t most);

#endif
