#ifndef VMETTE_STUB_VIRTUALIZATION_H
#define VMETTE_STUB_VIRTUALIZATION_H

#import <Foundation/Foundation.h>

#define SINCE_14 __attribute__((availability(macos, introduced = 14.0)))

/* --- Of what a machine is made */

@interface VZBootLoader : NSObject
@end

@interface VZLinuxBootLoader : VZBootLoader
@property(copy) NSString *commandLine;
@property(copy) NSURL *initialRamdiskURL;
- (instancetype)initWithKernelURL:(NSURL *)url;
@end

@interface VZGenericMachineIdentifier : NSObject
@property(readonly, copy) NSData *dataRepresentation;
- (instancetype)initWithDataRepresentation:(NSData *)data;
@end

@interface VZPlatformConfiguration : NSObject
@end

@interface VZGenericPlatformConfiguration : VZPlatformConfiguration
@property(copy) VZGenericMachineIdentifier *machineIdentifier;
@end

@interface VZSerialPortAttachment : NSObject
@end

@interface VZFileHandleSerialPortAttachment : VZSerialPortAttachment
- (instancetype)initWithFileHandleForReading:(NSFileHandle *)reading fileHandleForWriting:(NSFileHandle *)writing;
@end

@interface VZSerialPortConfiguration : NSObject
@property(strong) VZSerialPortAttachment *attachment;
@end

@interface VZVirtioConsoleDeviceSerialPortConfiguration : VZSerialPortConfiguration
@end

@interface VZConsolePortConfiguration : NSObject
@property(strong) VZSerialPortAttachment *attachment;
@end

@interface VZVirtioConsolePortConfiguration : VZConsolePortConfiguration
@property(copy) NSString *name;
@property BOOL isConsole;
@end

@interface VZVirtioConsolePortConfigurationArray : NSObject
- (void)setObject:(VZVirtioConsolePortConfiguration *)port atIndexedSubscript:(NSUInteger)index;
- (VZVirtioConsolePortConfiguration *)objectAtIndexedSubscript:(NSUInteger)index;
@end

@interface VZConsoleDeviceConfiguration : NSObject
@end

@interface VZVirtioConsoleDeviceConfiguration : VZConsoleDeviceConfiguration
@property(readonly) VZVirtioConsolePortConfigurationArray *ports;
@end

typedef NS_ENUM(NSInteger, VZDiskImageCachingMode){
    VZDiskImageCachingModeAutomatic,
    VZDiskImageCachingModeUncached,
    VZDiskImageCachingModeCached,
};

typedef NS_ENUM(NSInteger, VZDiskImageSynchronizationMode){
    VZDiskImageSynchronizationModeFull = 1,
    VZDiskImageSynchronizationModeFsync = 2,
    VZDiskImageSynchronizationModeNone = 3,
};

@interface VZStorageDeviceAttachment : NSObject
@end

@interface VZDiskImageStorageDeviceAttachment : VZStorageDeviceAttachment
- (instancetype)initWithURL:(NSURL *)url
                   readOnly:(BOOL)readOnly
                cachingMode:(VZDiskImageCachingMode)caching
        synchronizationMode:(VZDiskImageSynchronizationMode)synchronization
                      error:(NSError **)error;
@end

@interface VZStorageDeviceConfiguration : NSObject
@end

@interface VZVirtioBlockDeviceConfiguration : VZStorageDeviceConfiguration
- (instancetype)initWithAttachment:(VZStorageDeviceAttachment *)attachment;
@end

@interface VZSharedDirectory : NSObject
- (instancetype)initWithURL:(NSURL *)url readOnly:(BOOL)readOnly;
@end

@interface VZDirectoryShare : NSObject
@end

@interface VZSingleDirectoryShare : VZDirectoryShare
- (instancetype)initWithDirectory:(VZSharedDirectory *)directory;
@end

typedef NS_ENUM(NSInteger, VZLinuxRosettaAvailability){
    VZLinuxRosettaAvailabilityNotSupported,
    VZLinuxRosettaAvailabilityNotInstalled,
    VZLinuxRosettaAvailabilityInstalled,
};

@interface VZLinuxRosettaDirectoryShare : VZDirectoryShare
@property(class, readonly) VZLinuxRosettaAvailability availability;
- (instancetype)initWithError:(NSError **)error;
@end

@interface VZDirectorySharingDeviceConfiguration : NSObject
@end

@interface VZVirtioFileSystemDeviceConfiguration : VZDirectorySharingDeviceConfiguration
@property(strong) VZDirectoryShare *share;
- (instancetype)initWithTag:(NSString *)tag;
+ (BOOL)validateTag:(NSString *)tag error:(NSError **)error;
@end

@interface VZMACAddress : NSObject
- (instancetype)initWithString:(NSString *)string;
+ (instancetype)randomLocallyAdministeredAddress;
@end

@interface VZNetworkDeviceAttachment : NSObject
@end

@interface VZNATNetworkDeviceAttachment : VZNetworkDeviceAttachment
@end

@interface VZNetworkDeviceConfiguration : NSObject
@property(copy) VZMACAddress *MACAddress;
@property(strong) VZNetworkDeviceAttachment *attachment;
@end

@interface VZVirtioNetworkDeviceConfiguration : VZNetworkDeviceConfiguration
@end

@interface VZSocketDeviceConfiguration : NSObject
@end

@interface VZVirtioSocketDeviceConfiguration : VZSocketDeviceConfiguration
@end

@interface VZEntropyDeviceConfiguration : NSObject
@end

@interface VZVirtioEntropyDeviceConfiguration : VZEntropyDeviceConfiguration
@end

@interface VZMemoryBalloonDeviceConfiguration : NSObject
@end

@interface VZVirtioTraditionalMemoryBalloonDeviceConfiguration : VZMemoryBalloonDeviceConfiguration
@end

@interface VZVirtualMachineConfiguration : NSObject
@property(class, readonly) uint64_t minimumAllowedMemorySize, maximumAllowedMemorySize;
@property(class, readonly) NSUInteger minimumAllowedCPUCount, maximumAllowedCPUCount;
@property(strong) VZBootLoader *bootLoader;
@property(strong) VZPlatformConfiguration *platform;
@property NSUInteger CPUCount;
@property uint64_t memorySize;
@property(copy) NSArray<VZSerialPortConfiguration *> *serialPorts;
@property(copy) NSArray<VZConsoleDeviceConfiguration *> *consoleDevices;
@property(copy) NSArray<VZStorageDeviceConfiguration *> *storageDevices;
@property(copy) NSArray<VZDirectorySharingDeviceConfiguration *> *directorySharingDevices;
@property(copy) NSArray<VZNetworkDeviceConfiguration *> *networkDevices;
@property(copy) NSArray<VZSocketDeviceConfiguration *> *socketDevices;
@property(copy) NSArray<VZEntropyDeviceConfiguration *> *entropyDevices;
@property(copy) NSArray<VZMemoryBalloonDeviceConfiguration *> *memoryBalloonDevices;
- (BOOL)validateWithError:(NSError **)error;
- (BOOL)validateSaveRestoreSupportWithError:(NSError **)error SINCE_14;
@end

/* --- A machine */

typedef NS_ENUM(NSInteger, VZVirtualMachineState){
    VZVirtualMachineStateStopped,
    VZVirtualMachineStateRunning,
    VZVirtualMachineStatePaused,
    VZVirtualMachineStateError,
    VZVirtualMachineStateStarting,
    VZVirtualMachineStatePausing,
    VZVirtualMachineStateResuming,
    VZVirtualMachineStateStopping,
    VZVirtualMachineStateSaving SINCE_14,
    VZVirtualMachineStateRestoring SINCE_14,
};

@class VZVirtualMachine, VZVirtioSocketDevice, VZVirtioSocketListener;

@protocol VZVirtualMachineDelegate <NSObject>
@optional
- (void)guestDidStopVirtualMachine:(VZVirtualMachine *)machine;
- (void)virtualMachine:(VZVirtualMachine *)machine didStopWithError:(NSError *)error;
@end

@interface VZSocketDevice : NSObject
@end

@interface VZVirtualMachine : NSObject
@property(class, readonly, getter=isSupported) BOOL supported;
@property(readonly) VZVirtualMachineState state;
@property(weak) id<VZVirtualMachineDelegate> delegate;
@property(readonly, copy) NSArray<VZSocketDevice *> *socketDevices;
- (instancetype)initWithConfiguration:(VZVirtualMachineConfiguration *)configuration queue:(dispatch_queue_t)queue;
- (void)startWithCompletionHandler:(void (^)(NSError *error))handler;
- (void)pauseWithCompletionHandler:(void (^)(NSError *error))handler;
- (void)resumeWithCompletionHandler:(void (^)(NSError *error))handler;
- (void)stopWithCompletionHandler:(void (^)(NSError *error))handler;
- (BOOL)requestStopWithError:(NSError **)error;
- (void)saveMachineStateToURL:(NSURL *)url completionHandler:(void (^)(NSError *error))handler SINCE_14;
- (void)restoreMachineStateFromURL:(NSURL *)url completionHandler:(void (^)(NSError *error))handler SINCE_14;
@end

/* --- vsock */

@interface VZVirtioSocketConnection : NSObject
@property(readonly) int fileDescriptor;
@end

@protocol VZVirtioSocketListenerDelegate <NSObject>
@optional
- (BOOL)listener:(VZVirtioSocketListener *)listener
    shouldAcceptNewConnection:(VZVirtioSocketConnection *)connection
             fromSocketDevice:(VZVirtioSocketDevice *)device;
@end

@interface VZVirtioSocketListener : NSObject
@property(weak) id<VZVirtioSocketListenerDelegate> delegate;
@end

@interface VZVirtioSocketDevice : VZSocketDevice
- (void)setSocketListener:(VZVirtioSocketListener *)listener forPort:(uint32_t)port;
- (void)removeSocketListenerForPort:(uint32_t)port;
- (void)connectToPort:(uint32_t)port
    completionHandler:(void (^)(VZVirtioSocketConnection *connection, NSError *error))handler;
@end

#endif
