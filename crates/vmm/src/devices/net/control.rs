//! The control queue, by which a driver chooses its queue pairs and offloads and acknowledges that
//! it has announced itself.
//!
//! Source: VIRTIO 1.3, 5.1.6.5 (control virtqueue).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use crate::virtio::budget::Budget;
use crate::virtio::{
    DescriptorChain, DeviceError, GuestRam, Interrupt, Reader, Served, ServedQueue, Turn,
};

/// The commands that one call carries out.
const BUDGET: Budget = Budget::new(16, u64::MAX);

/// A command of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// The driver has announced itself.
    AnnounceAck,
    /// The driver uses this number of queue pairs from now on.
    SetQueuePairs(u16),
    /// The driver wants these of the offloads that it negotiated (feature bits).
    SetGuestOffloads(u64),
}

/// Carries out the commands in the queue. `execute` returns whether the device does what is asked.
pub(super) fn serve(
    queue: &mut ServedQueue,
    ram: &GuestRam,
    interrupt: &dyn Interrupt,
    mut execute: impl FnMut(Command) -> Result<bool, DeviceError>,
) -> Result<(), DeviceError> {
    let mut handler = |queue: &mut ServedQueue, chain: &mut DescriptorChain<'_>| {
        let done = match parse(chain.reader()) {
            Some(command) => execute(command)?,
            None => false,
        };
        let status = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        let answered = chain.writer().write_all(&[status as u8]);
        answered.map_err(|_| queue.driver_error("a control command has no room for its answer"))?;
        Ok(Served::Used {
            written: 1,
            bytes: 0,
        })
    };
    let mut budget = BUDGET;
    queue.serve(ram, interrupt, &mut Turn::new(&mut budget), &mut handler)?;
    Ok(())
}

/// Reads a command. Returns `None` where it is cut short or is not one that was offered.
fn parse(mut reader: Reader<'_, '_>) -> Option<Command> {
    let [class, command] = reader.read_array().ok()?;
    match (u32::from(class), u32::from(command)) {
        (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => Some(Command::AnnounceAck),
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
            let pairs = reader.read_array().ok()?;
            Some(Command::SetQueuePairs(u16::from_le_bytes(pairs)))
        }
        (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
            let offloads = reader.read_array().ok()?;
            Some(Command::SetGuestOffloads(u64::from_le_bytes(offloads)))
        }
        _ => None,
    }
}
