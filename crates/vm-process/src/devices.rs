//! The virtio devices of a VM, in slot order: disks, interfaces, vsock, balloon, rng, shares. The guest's
//! names (`vda`, `eth0`) depend on this order.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use clone_api::config::BalloonConfig;
use clone_api::control::{BalloonStatus, GuestMemoryStats};
use clone_api::{ApiError, VmConfig};
use clone_disk::Disk;
use clone_memory::GuestMemory;
use clone_start::error::Result;
use clone_vmm::devices::balloon::{Balloon, BalloonOffer, DiscardRam};
use clone_vmm::devices::fs::{Fs, FsHandle};
use clone_vmm::devices::net::NetHandle;
use clone_vmm::devices::rng::Rng;
use clone_vmm::devices::vsock::{Vsock, VsockResources};
use clone_vmm::event_loop::EventLoop;
use clone_vmm::machine::DeviceSlot;
use clone_vmm::pci::virtio_pci::SharedVirtioDevice;
use clone_vmm::virtio::{DeviceError, VirtioDevice};

use super::open::DeviceResources;
use super::released::{RecordedDiscard, Released};
use super::{disks, nets};

/// The devices, and the handles that reach them without their transports.
pub(super) struct Devices {
    pub(super) slots: Vec<DeviceSlot>,
    pub(super) handles: Handles,
}

/// The handles through which the control socket reaches devices.
#[derive(Default)]
pub(super) struct Handles {
    pub(super) nets: Vec<NetHandle>,
    /// The disks, each locked by its device for one call at a time. A snapshot freezes a disk while
    /// its device is paused.
    pub(super) disks: Vec<Arc<Mutex<Disk>>>,
    /// The balloon, locked by its transport and the control socket for one call at a time.
    pub(super) balloon: Option<Arc<Mutex<Balloon>>>,
    /// The shares by their tags.
    pub(super) shares: Vec<(String, FsHandle)>,
}

/// Builds new devices on the resources that were opened for them.
pub(super) fn build(
    config: &VmConfig,
    resources: DeviceResources,
    memory: &GuestMemory,
    released: &Released,
    events: &mut EventLoop,
) -> Result<Devices> {
    let mut devices = Devices {
        slots: Vec::new(),
        handles: Handles::default(),
    };
    for (disk, files) in config.disks.iter().zip(resources.disks) {
        let (device, opened) = disks::device(disk, files)?;
        devices.handles.disks.push(opened);
        devices.add(device, events);
    }
    for net in resources.nets {
        let device = nets::device(net)?;
        devices.handles.nets.push(device.handle());
        devices.add(device, events);
    }
    if let Some(listener) = resources.vsock {
        let device = Vsock::new(VsockResources::new(listener), config.vsock.cid.into());
        devices.add(device.map_err(to_api_error)?, events);
    }
    if config.balloon.enabled {
        let device = Arc::new(Mutex::new(balloon(&config.balloon, memory, released)?));
        devices.handles.balloon = Some(Arc::clone(&device));
        devices.add_shared(device, events);
    }
    if config.rng {
        devices.add(Rng::new(None).map_err(to_api_error)?, events);
    }
    for (share, socket) in config.shares.iter().zip(resources.shares) {
        let device = Fs::new(&share.tag, socket).map_err(to_api_error)?;
        let handle = (share.tag.clone(), device.handle());
        devices.handles.shares.push(handle);
        devices.add(device, events);
    }
    Ok(devices)
}

fn to_api_error(error: DeviceError) -> ApiError {
    ApiError::internal(&error)
}

fn balloon(config: &BalloonConfig, memory: &GuestMemory, released: &Released) -> Result<Balloon> {
    let discard = Box::new(RecordedDiscard {
        discard: DiscardRam::new(memory.ram().clone()),
        released: released.clone(),
        layout: *memory.layout(),
    });
    let offer = BalloonOffer {
        deflate_on_oom: config.deflate_on_oom,
        reporting: config.free_page_reporting,
        ..BalloonOffer::default()
    };
    let mut balloon = Balloon::new(discard, offer).map_err(to_api_error)?;
    balloon.set_target_bytes(config.size.0);
    Ok(balloon)
}

/// The status of a balloon as the control socket reports it.
pub(super) fn balloon_status(balloon: &Balloon) -> BalloonStatus {
    let guest = balloon.stats();
    BalloonStatus {
        target_bytes: balloon.target_bytes(),
        actual_bytes: balloon.actual_bytes(),
        guest: guest.map(|(stats, _)| GuestMemoryStats {
            swap_in_bytes: stats.swap_in,
            swap_out_bytes: stats.swap_out,
            major_faults: stats.major_faults,
            minor_faults: stats.minor_faults,
            free_bytes: stats.free_memory,
            total_bytes: stats.total_memory,
            available_bytes: stats.available_memory,
            disk_caches_bytes: stats.disk_caches,
            oom_kills: stats.oom_kills,
        }),
        guest_age_ms: guest.map(|(_, age)| age.as_millis() as u64),
    }
}

impl Handles {
    /// Why shares are not served any more, by their tags.
    pub(super) fn share_failures(&self) -> BTreeMap<String, String> {
        let failed = |(tag, share): &(String, FsHandle)| Some((tag.clone(), share.failure()?));
        self.shares.iter().filter_map(failed).collect()
    }

    /// The counters of each device, by its name.
    pub(super) fn counters(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        let nets = self.nets.iter().enumerate().map(|(index, net)| {
            let counts = net.counts();
            let counters = [
                ("rx_frames", counts.rx_frames),
                ("rx_bytes", counts.rx_bytes),
                ("rx_dropped", counts.rx_dropped),
                ("tx_frames", counts.tx_frames),
                ("tx_bytes", counts.tx_bytes),
                ("tx_dropped", counts.tx_dropped),
            ];
            let counters = counters.map(|(name, count)| (name.to_owned(), count));
            (format!("net{index}"), BTreeMap::from(counters))
        });
        nets.collect()
    }
}

impl Devices {
    fn add<D: VirtioDevice + 'static>(&mut self, device: D, events: &mut EventLoop) {
        self.add_shared(Arc::new(Mutex::new(device)), events);
    }

    fn add_shared(&mut self, device: SharedVirtioDevice, events: &mut EventLoop) {
        self.slots.push(DeviceSlot {
            device,
            registrar: events.reserve(),
        });
    }
}
