//! The control queue: how a driver picks its queue pairs and offloads and says that it has
//! announced itself.
//!
//! Source: VIRTIO 1.3, 5.1.6.5 (control virtqueue).

use std::io::{Read, Write};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use virtio_queue::{DescriptorChain, QueueT};

use super::DEVICE;
use super::queue::{Moved, Stopped, next_chain};
use crate::virtio::{ActiveQueue, DeviceError, GuestRam};

/// Commands carried out by one call.
const BUDGET: usize = 16;

/// What a driver may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// It has announced itself.
    AnnounceAck,
    /// It uses this many queue pairs from now on.
    SetQueuePairs(u16),
    /// It wants these offloads of those it negotiated (feature bits).
    SetGuestOffloads(u64),
}

/// Carries out the commands in the queue: `execute` says whether the device does what is asked.
pub(super) fn serve(
    active: &mut ActiveQueue,
    ram: &GuestRam,
    mut execute: impl FnMut(Command) -> Result<bool, DeviceError>,
) -> Result<Moved, DeviceError> {
    let index = active.index;
    let queue = &mut active.queue;
    let mut any_used = false;
    let mut stopped = Stopped::Budget;
    queue
        .disable_notification(ram)
        .map_err(DEVICE.queue_error(index))?;
    let mut left = BUDGET;
    while left > 0 {
        let Some(chain) = next_chain(queue, index, ram)? else {
            if queue
                .enable_notification(ram)
                .map_err(DEVICE.queue_error(index))?
            {
                left -= 1;
                continue;
            }
            stopped = Stopped::NoBuffers;
            break;
        };
        left -= 1;
        let head = chain.head_index();
        let done = match parse(chain.clone(), ram).map_err(DEVICE.queue_error(index))? {
            Some(command) => execute(command)?,
            None => false,
        };
        acknowledge(chain, ram, index, done)?;
        queue
            .add_used(ram, head, 1)
            .map_err(DEVICE.queue_error(index))?;
        any_used = true;
    }
    let interrupt = any_used
        && queue
            .needs_notification(ram)
            .map_err(DEVICE.queue_error(index))?;
    Ok(Moved { stopped, interrupt })
}

/// Reads a command; `None` where it is cut short or one that was not offered.
fn parse(
    chain: DescriptorChain<&GuestRam>,
    ram: &GuestRam,
) -> Result<Option<Command>, virtio_queue::Error> {
    let mut reader = chain.reader(ram)?;
    let mut class_and_command = [0; 2];
    if reader.read_exact(&mut class_and_command).is_err() {
        return Ok(None);
    }
    let [class, command] = class_and_command.map(u32::from);
    Ok(match (class, command) {
        (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => Some(Command::AnnounceAck),
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
            let mut pairs = [0; 2];
            reader
                .read_exact(&mut pairs)
                .ok()
                .map(|()| Command::SetQueuePairs(u16::from_le_bytes(pairs)))
        }
        (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
            let mut offloads = [0; 8];
            reader
                .read_exact(&mut offloads)
                .ok()
                .map(|()| Command::SetGuestOffloads(u64::from_le_bytes(offloads)))
        }
        _ => None,
    })
}

fn acknowledge(
    chain: DescriptorChain<&GuestRam>,
    ram: &GuestRam,
    index: u16,
    done: bool,
) -> Result<(), DeviceError> {
    let status = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
    chain
        .writer(ram)
        .map_err(DEVICE.queue_error(index))?
        .write_all(&[status as u8])
        .map_err(|_| DEVICE.driver_error("a control command has no room for its answer"))
}
