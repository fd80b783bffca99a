/* Virtualization.framework behind the C API of vz_shim.h, which says what each function does. Compiled with ARC. */
#import <Foundation/Foundation.h>
#import <Security/Security.h>
#import <Virtualization/Virtualization.h>

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "vz_shim.h"

#define EXPORT __attribute__((visibility("default")))

static NSString *const entitlement = @"com.apple.security.virtualization";

/* --- Errors -------------------------------------------------------------------------------------------------------- */

/* Copies as many whole characters as there is room for. */
static void copy_text(char *to, size_t size, NSString *text) {
    NSUInteger used = 0;
    [text getBytes:to
             maxLength:size - 1
            usedLength:&used
              encoding:NSUTF8StringEncoding
               options:0
                 range:NSMakeRange(0, text.length)
        remainingRange:NULL];
    to[used] = 0;
    for (char *c = to; *c != 0; c++)
        if (*c == '\n' || *c == '\r') *c = ' ';
}

static bool fail_with(struct vz_error *error, NSString *domain, int64_t code, NSString *text) {
    if (error != NULL) {
        copy_text(error->domain, sizeof error->domain, domain);
        copy_text(error->text, sizeof error->text, text);
        error->code = code;
    }
    return false;
}

/* An error of ours: `code` is an errno. */
static bool fail(struct vz_error *error, int code, NSString *text) {
    return fail_with(error, @"vmette", code, text);
}

static NSError *posix_error(int code) { return [NSError errorWithDomain:NSPOSIXErrorDomain code:code userInfo:nil]; }

/* An error of the framework's: what failed, why, and what is beneath it. */
static bool report(struct vz_error *error, NSError *problem) {
    if (problem == nil) return fail(error, EIO, @"the framework has failed, and does not say why");
    NSMutableString *text = [NSMutableString stringWithString:problem.localizedDescription];
    NSError *cause = problem.userInfo[NSUnderlyingErrorKey];
    for (NSString *more in @[ problem.localizedFailureReason ?: @"", cause.localizedDescription ?: @"" ])
        if (more.length > 0 && ![text containsString:more]) [text appendFormat:@" %@", more];
    return fail_with(error, problem.domain, problem.code, text);
}

/* --- This computer ------------------------------------------------------------------------------------------------- */

static bool is_entitled(void) {
    SecTaskRef task = SecTaskCreateFromSelf(NULL);
    if (task == NULL) return false;
    id value = (__bridge_transfer id)SecTaskCopyValueForEntitlement(task, (__bridge CFStringRef)entitlement, NULL);
    CFRelease(task);
    return [value isKindOfClass:[NSNumber class]] && [value boolValue];
}

static enum vz_rosetta rosetta_state(void) {
    switch (VZLinuxRosettaDirectoryShare.availability) {
    case VZLinuxRosettaAvailabilityInstalled: return VZ_ROSETTA_INSTALLED;
    case VZLinuxRosettaAvailabilityNotInstalled: return VZ_ROSETTA_NOT_INSTALLED;
    case VZLinuxRosettaAvailabilityNotSupported: return VZ_ROSETTA_NOT_SUPPORTED;
    }
    return VZ_ROSETTA_NOT_SUPPORTED;
}

EXPORT void vz_capabilities(struct vz_capabilities *result) {
    @autoreleasepool {
        NSOperatingSystemVersion version = NSProcessInfo.processInfo.operatingSystemVersion;
        *result = (struct vz_capabilities){
            .supported = VZVirtualMachine.supported,
            .entitled = is_entitled(),
            .rosetta = rosetta_state(),
            .macos = {(uint32_t)version.majorVersion, (uint32_t)version.minorVersion, (uint32_t)version.patchVersion},
            .min_cpus = (uint32_t)VZVirtualMachineConfiguration.minimumAllowedCPUCount,
            .max_cpus = (uint32_t)VZVirtualMachineConfiguration.maximumAllowedCPUCount,
            .min_memory = VZVirtualMachineConfiguration.minimumAllowedMemorySize,
            .max_memory = VZVirtualMachineConfiguration.maximumAllowedMemorySize,
        };
        if (@available(macOS 14.0, *)) result->save_restore = true;
    }
}

/* --- Configuration ------------------------------------------------------------------------------------------------- */

static NSURL *file_url(const char *path) {
    return [NSURL fileURLWithFileSystemRepresentation:path isDirectory:NO relativeToURL:nil];
}

/* One end of a socket pair serves both directions. It stays its owner's to close. */
static VZFileHandleSerialPortAttachment *serial_attachment(int fd) {
    NSFileHandle *handle = [[NSFileHandle alloc] initWithFileDescriptor:fd closeOnDealloc:NO];
    return [[VZFileHandleSerialPortAttachment alloc] initWithFileHandleForReading:handle fileHandleForWriting:handle];
}

static VZVirtioConsoleDeviceConfiguration *named_ports(const struct vz_config *c) {
    VZVirtioConsoleDeviceConfiguration *device = [[VZVirtioConsoleDeviceConfiguration alloc] init];
    for (size_t i = 0; i < c->port_count; i++) {
        VZVirtioConsolePortConfiguration *port = [[VZVirtioConsolePortConfiguration alloc] init];
        port.name = @(c->ports[i].name);
        port.isConsole = NO;
        port.attachment = serial_attachment(c->ports[i].fd);
        device.ports[i] = port;
    }
    return device;
}

static VZStorageDeviceConfiguration *disk(const struct vz_disk *d, struct vz_error *error) {
    NSError *problem = nil;
    /* A disk that is thrown away need never reach the medium, and one that is read is best read once. */
    VZDiskImageCachingMode caching = d->kept ? VZDiskImageCachingModeAutomatic : VZDiskImageCachingModeCached;
    VZDiskImageSynchronizationMode flushing =
        d->kept ? VZDiskImageSynchronizationModeFull : VZDiskImageSynchronizationModeNone;
    VZDiskImageStorageDeviceAttachment *attachment =
        [[VZDiskImageStorageDeviceAttachment alloc] initWithURL:file_url(d->path)
                                                       readOnly:d->read_only
                                                    cachingMode:caching
                                            synchronizationMode:flushing
                                                          error:&problem];
    if (attachment == nil) {
        report(error, problem);
        return nil;
    }
    return [[VZVirtioBlockDeviceConfiguration alloc] initWithAttachment:attachment];
}

static VZDirectorySharingDeviceConfiguration *sharing(const char *tag, VZDirectoryShare *share, struct vz_error *error) {
    NSError *problem = nil;
    if (![VZVirtioFileSystemDeviceConfiguration validateTag:@(tag) error:&problem]) {
        report(error, problem);
        return nil;
    }
    VZVirtioFileSystemDeviceConfiguration *device =
        [[VZVirtioFileSystemDeviceConfiguration alloc] initWithTag:@(tag)];
    device.share = share;
    return device;
}

static VZDirectorySharingDeviceConfiguration *directory(const struct vz_share *s, struct vz_error *error) {
    NSURL *url = [NSURL fileURLWithFileSystemRepresentation:s->path isDirectory:YES relativeToURL:nil];
    VZSharedDirectory *shared = [[VZSharedDirectory alloc] initWithURL:url readOnly:s->read_only];
    return sharing(s->tag, [[VZSingleDirectoryShare alloc] initWithDirectory:shared], error);
}

static VZDirectorySharingDeviceConfiguration *rosetta(const char *tag, struct vz_error *error) {
    NSError *problem = nil;
    VZLinuxRosettaDirectoryShare *share = nil;
    if (rosetta_state() != VZ_ROSETTA_INSTALLED) {
        fail(error, ENOENT, @"Rosetta is not installed, or not supported");
        return nil;
    }
    share = [[VZLinuxRosettaDirectoryShare alloc] initWithError:&problem];
    if (share == nil) {
        report(error, problem);
        return nil;
    }
    return sharing(tag, share, error);
}

static VZNetworkDeviceConfiguration *network(const char *mac, struct vz_error *error) {
    VZVirtioNetworkDeviceConfiguration *device = [[VZVirtioNetworkDeviceConfiguration alloc] init];
    VZMACAddress *address = VZMACAddress.randomLocallyAdministeredAddress;
    if (mac != NULL && (address = [[VZMACAddress alloc] initWithString:@(mac)]) == nil) {
        fail(error, EINVAL, [NSString stringWithFormat:@"%s is no MAC address", mac]);
        return nil;
    }
    device.MACAddress = address;
    device.attachment = [[VZNATNetworkDeviceAttachment alloc] init];
    return device;
}

static VZGenericPlatformConfiguration *platform(const struct vz_config *c, struct vz_error *error) {
    VZGenericPlatformConfiguration *made = [[VZGenericPlatformConfiguration alloc] init];
    if (c->identifier != NULL) {
        NSData *data = [NSData dataWithBytes:c->identifier length:c->identifier_size];
        VZGenericMachineIdentifier *identifier =
            [[VZGenericMachineIdentifier alloc] initWithDataRepresentation:data];
        if (identifier == nil) {
            fail(error, EINVAL, @"the machine's identifier is malformed");
            return nil;
        }
        made.machineIdentifier = identifier;
    }
    return made;
}

/* What the framework is to make, not validated; nil if a part of it cannot be made. */
static VZVirtualMachineConfiguration *configuration(const struct vz_config *c, struct vz_error *error) {
    VZVirtualMachineConfiguration *made = [[VZVirtualMachineConfiguration alloc] init];
    VZLinuxBootLoader *loader = [[VZLinuxBootLoader alloc] initWithKernelURL:file_url(c->kernel)];
    loader.commandLine = @(c->cmdline);
    if (c->initrd != NULL) loader.initialRamdiskURL = file_url(c->initrd);
    made.bootLoader = loader;
    made.CPUCount = c->cpus;
    made.memorySize = c->memory;
    VZGenericPlatformConfiguration *generic = platform(c, error);
    if (generic == nil) return nil;
    made.platform = generic;
    if (c->console >= 0) {
        VZVirtioConsoleDeviceSerialPortConfiguration *serial =
            [[VZVirtioConsoleDeviceSerialPortConfiguration alloc] init];
        serial.attachment = serial_attachment(c->console);
        made.serialPorts = @[ serial ];
    }
    if (c->port_count > 0) made.consoleDevices = @[ named_ports(c) ];
    NSMutableArray<VZStorageDeviceConfiguration *> *disks = [NSMutableArray array];
    for (size_t i = 0; i < c->disk_count; i++) {
        VZStorageDeviceConfiguration *device = disk(&c->disks[i], error);
        if (device == nil) return nil;
        [disks addObject:device];
    }
    made.storageDevices = disks;
    NSMutableArray<VZDirectorySharingDeviceConfiguration *> *shares = [NSMutableArray array];
    for (size_t i = 0; i < c->share_count + (c->rosetta != NULL); i++) {
        VZDirectorySharingDeviceConfiguration *device =
            i < c->share_count ? directory(&c->shares[i], error) : rosetta(c->rosetta, error);
        if (device == nil) return nil;
        [shares addObject:device];
    }
    made.directorySharingDevices = shares;
    if (c->network) {
        VZNetworkDeviceConfiguration *card = network(c->mac, error);
        if (card == nil) return nil;
        made.networkDevices = @[ card ];
    }
    if (c->vsock) made.socketDevices = @[ [[VZVirtioSocketDeviceConfiguration alloc] init] ];
    if (c->entropy) made.entropyDevices = @[ [[VZVirtioEntropyDeviceConfiguration alloc] init] ];
    if (c->balloon)
        made.memoryBalloonDevices = @[ [[VZVirtioTraditionalMemoryBalloonDeviceConfiguration alloc] init] ];
    return made;
}

/* The same, validated. */
static VZVirtualMachineConfiguration *validated(const struct vz_config *c, struct vz_error *error) {
    NSError *problem = nil;
    VZVirtualMachineConfiguration *made = configuration(c, error);
    if (made == nil || [made validateWithError:&problem]) return made;
    report(error, problem);
    return nil;
}

EXPORT bool vz_validate(const struct vz_config *c, struct vz_error *error) {
    @autoreleasepool {
        return validated(c, error) != nil;
    }
}

static bool fail_before_14(struct vz_error *error) {
    return fail(error, ENOTSUP, @"machines can be saved and restored on macOS 14 and later");
}

EXPORT bool vz_validate_save(const struct vz_config *c, struct vz_error *error) {
    @autoreleasepool {
        NSError *problem = nil;
        VZVirtualMachineConfiguration *made = validated(c, error);
        if (made == nil) return false;
        if (@available(macOS 14.0, *))
            return [made validateSaveRestoreSupportWithError:&problem] || report(error, problem);
        return fail_before_14(error);
    }
}

/* --- A machine ----------------------------------------------------------------------------------------------------- */

/* Hands over the connections to one port. */
@interface VmetteListener : NSObject <VZVirtioSocketListenerDelegate>
@property(nonatomic) uint32_t port;
@property(nonatomic) vz_accepted accepted;
@property(nonatomic) void *context;
@property(nonatomic, strong) VZVirtioSocketListener *listener; /* which holds its delegate weakly */
@end

@implementation VmetteListener

- (BOOL)listener:(VZVirtioSocketListener *)listener
    shouldAcceptNewConnection:(VZVirtioSocketConnection *)connection
             fromSocketDevice:(VZVirtioSocketDevice *)device {
    (void)listener;
    (void)device;
    /* The connection's own descriptor is closed when the connection is let go of. */
    int fd = fcntl(connection.fileDescriptor, F_DUPFD_CLOEXEC, 0);
    if (fd < 0) return NO;
    self.accepted(self.context, self.port, fd);
    return YES;
}

@end

/* What a struct vz_machine is. All that is below `queue` is used on it alone. */
@interface VmetteMachine : NSObject <VZVirtualMachineDelegate>
@property(nonatomic, strong) dispatch_queue_t queue;
@property(nonatomic, copy) NSData *identifier;
@property(nonatomic, strong) VZVirtualMachine *machine; /* which holds its delegate weakly */
@property(nonatomic) vz_ended ended;                     /* NULL once it has been called, or is not to be called any more */
@property(nonatomic) void *context;
@property(nonatomic) BOOL started;
@property(nonatomic, strong) NSMutableDictionary<NSNumber *, VmetteListener *> *listeners;
@end

@implementation VmetteMachine

/* It runs from now on, or has run: it may have ended before its start was told. */
- (void)begin {
    struct vz_error error;
    self.started = YES;
    if (self.machine.state == VZVirtualMachineStateStopped) [self endWithError:NULL];
    if (self.machine.state != VZVirtualMachineStateError) return;
    fail(&error, EIO, @"the virtual machine stopped while it started");
    [self endWithError:&error];
}

- (void)endWithError:(const struct vz_error *)error {
    vz_ended ended = self.ended;
    if (ended == NULL || !self.started) return;
    self.ended = NULL;
    ended(self.context, error);
}

- (void)guestDidStopVirtualMachine:(VZVirtualMachine *)machine {
    (void)machine;
    [self endWithError:NULL];
}

- (void)virtualMachine:(VZVirtualMachine *)machine didStopWithError:(NSError *)problem {
    (void)machine;
    struct vz_error error;
    report(&error, problem);
    [self endWithError:&error];
}

- (VZVirtioSocketDevice *)socketDevice {
    return (VZVirtioSocketDevice *)self.machine.socketDevices.firstObject;
}

@end

static VmetteMachine *object(struct vz_machine *machine) { return (__bridge VmetteMachine *)(void *)machine; }

/* Calls `function` on the machine's queue with a completion handler, and waits until that has been called. */
static bool complete(VmetteMachine *m, struct vz_error *error,
                     void (^function)(VZVirtualMachine *machine, void (^completion)(NSError *problem))) {
    @autoreleasepool {
        dispatch_semaphore_t done = dispatch_semaphore_create(0);
        __block bool good = false;
        dispatch_async(m.queue, ^{
          function(m.machine, ^(NSError *problem) {
            good = problem == nil || report(error, problem);
            dispatch_semaphore_signal(done);
          });
        });
        dispatch_semaphore_wait(done, DISPATCH_TIME_FOREVER);
        return good;
    }
}

EXPORT struct vz_machine *vz_create(const struct vz_config *c, vz_ended ended, void *context, struct vz_error *error) {
    @autoreleasepool {
        VZVirtualMachineConfiguration *made = validated(c, error);
        if (made == nil) return NULL;
        VmetteMachine *m = [[VmetteMachine alloc] init];
        m.queue = dispatch_queue_create("vmette.machine", DISPATCH_QUEUE_SERIAL);
        m.identifier = ((VZGenericPlatformConfiguration *)made.platform).machineIdentifier.dataRepresentation;
        m.ended = ended;
        m.context = context;
        m.listeners = [NSMutableDictionary dictionary];
        dispatch_sync(m.queue, ^{
          m.machine = [[VZVirtualMachine alloc] initWithConfiguration:made queue:m.queue];
          m.machine.delegate = m;
        });
        return (struct vz_machine *)(__bridge_retained void *)m;
    }
}

EXPORT void vz_release(struct vz_machine *machine) {
    @autoreleasepool {
        VmetteMachine *m = (__bridge_transfer VmetteMachine *)(void *)machine;
        dispatch_sync(m.queue, ^{
          m.ended = NULL;
          for (NSNumber *port in m.listeners.allKeys)
              [m.socketDevice removeSocketListenerForPort:port.unsignedIntValue];
          [m.listeners removeAllObjects];
        });
        vz_stop(machine, NULL); /* which fails if it does not run */
        dispatch_sync(m.queue, ^{
          m.machine.delegate = nil;
          m.machine = nil;
        });
    }
}

EXPORT enum vz_state vz_state(struct vz_machine *machine) {
    @autoreleasepool {
        VmetteMachine *m = object(machine);
        __block VZVirtualMachineState state;
        dispatch_sync(m.queue, ^{
          state = m.machine.state;
        });
        return (enum vz_state)state; /* the numbers are the framework's */
    }
}

EXPORT bool vz_start(struct vz_machine *machine, struct vz_error *error) {
    VmetteMachine *m = object(machine);
    return complete(m, error, ^(VZVirtualMachine *vm, void (^completion)(NSError *)) {
      [vm startWithCompletionHandler:^(NSError *problem) {
        completion(problem);
        if (problem == nil) [m begin];
      }];
    });
}

EXPORT bool vz_pause(struct vz_machine *machine, struct vz_error *error) {
    return complete(object(machine), error, ^(VZVirtualMachine *vm, void (^completion)(NSError *)) {
      [vm pauseWithCompletionHandler:completion];
    });
}

EXPORT bool vz_resume(struct vz_machine *machine, struct vz_error *error) {
    return complete(object(machine), error, ^(VZVirtualMachine *vm, void (^completion)(NSError *)) {
      [vm resumeWithCompletionHandler:completion];
    });
}

EXPORT bool vz_stop(struct vz_machine *machine, struct vz_error *error) {
    VmetteMachine *m = object(machine);
    return complete(m, error, ^(VZVirtualMachine *vm, void (^completion)(NSError *)) {
      [vm stopWithCompletionHandler:^(NSError *problem) {
        if (problem == nil) [m endWithError:NULL]; /* the delegate hears of ends that the guest brings about */
        completion(problem);
      }];
    });
}

EXPORT bool vz_request_stop(struct vz_machine *machine, struct vz_error *error) {
    return complete(object(machine), error, ^(VZVirtualMachine *vm, void (^completion)(NSError *)) {
      NSError *problem = nil;
      completion([vm requestStopWithError:&problem] ? nil : problem ?: posix_error(ENOTSUP));
    });
}

EXPORT bool vz_save(struct vz_machine *machine, const char *path, struct vz_error *error) {
    if (@available(macOS 14.0, *)) {
        return complete(object(machine), error, ^(VZVirtualMachine *vm, void (^completion)(NSError *)) {
          [vm saveMachineStateToURL:file_url(path) completionHandler:completion];
        });
    }
    return fail_before_14(error);
}

EXPORT bool vz_restore(struct vz_machine *machine, const char *path, struct vz_error *error) {
    if (@available(macOS 14.0, *)) {
        VmetteMachine *m = object(machine);
        return complete(m, error, ^(VZVirtualMachine *vm, void (^completion)(NSError *)) {
          [vm restoreMachineStateFromURL:file_url(path)
                       completionHandler:^(NSError *problem) {
                         completion(problem);
                         if (problem == nil) [m begin];
                       }];
        });
    }
    return fail_before_14(error);
}

EXPORT size_t vz_identifier(struct vz_machine *machine, uint8_t *buffer, size_t size) {
    @autoreleasepool {
        NSData *identifier = object(machine).identifier;
        [identifier getBytes:buffer length:size];
        return identifier.length;
    }
}

/* --- vsock --------------------------------------------------------------------------------------------------------- */

EXPORT int vz_vsock_connect(struct vz_machine *machine, uint32_t port, struct vz_error *error) {
    VmetteMachine *m = object(machine);
    __block int fd = -1;
    bool good = complete(m, error, ^(VZVirtualMachine *vm, void (^completion)(NSError *)) {
      (void)vm;
      VZVirtioSocketDevice *device = m.socketDevice;
      if (device == nil) {
          completion(posix_error(ENODEV));
          return;
      }
      [device connectToPort:port
          completionHandler:^(VZVirtioSocketConnection *connection, NSError *problem) {
            if (connection != nil) fd = fcntl(connection.fileDescriptor, F_DUPFD_CLOEXEC, 0);
            completion(fd >= 0 ? nil : problem ?: posix_error(errno));
          }];
    });
    return good ? fd : -1;
}

EXPORT bool vz_vsock_listen(struct vz_machine *machine, uint32_t port, vz_accepted accepted, void *context,
                            struct vz_error *error) {
    @autoreleasepool {
        VmetteMachine *m = object(machine);
        __block bool good = false;
        dispatch_sync(m.queue, ^{
          VZVirtioSocketDevice *device = m.socketDevice;
          if (device == nil) {
              fail(error, ENODEV, @"the machine has no vsock device");
              return;
          }
          if (m.listeners[@(port)] != nil) {
              fail(error, EADDRINUSE, [NSString stringWithFormat:@"somebody listens at vsock port %u", port]);
              return;
          }
          VmetteListener *listener = [[VmetteListener alloc] init];
          listener.port = port;
          listener.accepted = accepted;
          listener.context = context;
          listener.listener = [[VZVirtioSocketListener alloc] init];
          listener.listener.delegate = listener;
          m.listeners[@(port)] = listener;
          [device setSocketListener:listener.listener forPort:port];
          good = true;
        });
        return good;
    }
}

EXPORT void vz_vsock_unlisten(struct vz_machine *machine, uint32_t port) {
    @autoreleasepool {
        VmetteMachine *m = object(machine);
        dispatch_sync(m.queue, ^{
          if (m.listeners[@(port)] == nil) return;
          [m.socketDevice removeSocketListenerForPort:port];
          [m.listeners removeObjectForKey:@(port)];
        });
    }
}
