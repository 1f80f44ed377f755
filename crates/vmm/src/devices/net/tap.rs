//! Taps: Ethernet devices of the host kernel whose far end is a file descriptor.
//!
//! The launcher makes the interface, its addresses and its bridge. This only opens queues of the
//! interface, or takes queues that were opened before the process was jailed.
//!
//! Source: `linux/if_tun.h`, `Documentation/networking/tuntap.rst` of the Linux kernel.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use linux_raw_sys::if_tun::{
    IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR,
};
use linux_raw_sys::ioctl::{TUNGETIFF, TUNSETIFF, TUNSETOFFLOAD, TUNSETQUEUE, TUNSETVNETHDRSZ};

/// Bytes of the header before each frame: `struct virtio_net_hdr_v1`.
pub(super) const HEADER_LEN: usize = 12;

/// The ioctls that the device uses on its taps after it was built, for a seccomp filter.
pub const TAP_IOCTLS: &[u32] = &[TUNSETOFFLOAD, TUNSETQUEUE];

/// Errors of taps.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The device file cannot be opened.
    #[error("cannot open /dev/net/tun: {0}")]
    Open(#[source] io::Error),
    /// The interface's name is empty or longer than the kernel allows (15 bytes).
    #[error("{0:?} cannot name a network interface (1 to 15 bytes)")]
    Name(String),
    /// The kernel refuses a queue of the interface.
    #[error("cannot attach to the tap {name}: {source}")]
    Attach {
        /// The interface.
        name: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The file descriptor is not a tap with a virtio header.
    #[error("the file descriptor is not a tap without packet information and with a virtio header")]
    NotATap,
    /// The kernel refuses a setting.
    #[error("cannot set the tap's {setting}: {source}")]
    Setting {
        /// What was to be set.
        setting: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A queue of Ethernet frames with a virtio header of 12 bytes. A read or write moves one frame,
/// without blocking. Machines use [`Tap`].
pub trait Port: Send {
    /// The descriptor that frames are read from and written to, by this process or by vhost.
    fn file(&self) -> &File;

    /// Sets the offloads that may be left to the reader, as `TUN_F_…` bits.
    ///
    /// # Errors
    /// The kernel's error where it does not support one of them.
    fn set_offloads(&self, flags: u32) -> io::Result<()>;

    /// Steers frames to this queue, or away from it. This is only used for ports with several
    /// queues.
    ///
    /// # Errors
    /// The kernel's answer.
    fn set_attached(&self, attached: bool) -> io::Result<()>;
}

/// A queue of a tap.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Opens `queues` queues of the tap `name`, which is made if it does not exist (and then goes
    /// away with the last queue). Needs `CAP_NET_ADMIN`, or a tap that belongs to the user.
    ///
    /// # Errors
    /// [`TapError`], with the step that failed.
    pub fn open(name: &str, queues: u16) -> Result<Vec<Self>, TapError> {
        let request = interface_request(name)?;
        let attach_all = |multi_queue| {
            (0..queues)
                .map(|_| Self::attach(name, request, multi_queue))
                .collect::<Result<Vec<_>, _>>()
        };
        match attach_all(queues > 1) {
            // A tap that was made for several queues needs the flag even for one queue.
            Err(TapError::Attach { source, .. })
                if queues == 1 && source.raw_os_error() == Some(libc::EINVAL) =>
            {
                attach_all(true)
            }
            taps => taps,
        }
    }

    fn attach(name: &str, mut request: libc::ifreq, multi_queue: bool) -> Result<Self, TapError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(TapError::Open)?;
        let mut flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        if multi_queue {
            flags |= IFF_MULTI_QUEUE;
        }
        // The kernel's flags field has 16 bits, and these fit.
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one ifreq, which lives through the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF.into(), &raw mut request) })
            .map_err(|source| TapError::Attach {
                name: name.to_owned(),
                source,
            })?;
        Self::with_header(file)
    }

    /// Makes a tap of a queue that was opened elsewhere.
    ///
    /// # Errors
    /// [`TapError::NotATap`] where the descriptor is not a tap or has no virtio header.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, TapError> {
        let file = File::from(fd);
        let mut request = empty_request();
        // SAFETY: TUNGETIFF writes one ifreq, which lives through the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), TUNGETIFF.into(), &raw mut request) })
            .map_err(|_| TapError::NotATap)?;
        // SAFETY: TUNGETIFF filled in the flags; any value is valid for an integer.
        let flags = u32::from(unsafe { request.ifr_ifru.ifru_flags } as u16);
        let wanted = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        if flags & wanted != wanted {
            return Err(TapError::NotATap);
        }
        rustix::io::ioctl_fionbio(&file, true).map_err(|error| TapError::Setting {
            setting: "non-blocking mode",
            source: error.into(),
        })?;
        Self::with_header(file)
    }

    fn with_header(file: File) -> Result<Self, TapError> {
        let size = HEADER_LEN as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which lives through the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ.into(), &raw const size) })
            .map_err(|source| TapError::Setting {
                setting: "header size",
                source,
            })?;
        Ok(Self { file })
    }

    /// Returns the queue's descriptor, to be sent to the process that will use it.
    pub fn into_fd(self) -> OwnedFd {
        self.file.into()
    }
}

impl Port for Tap {
    fn file(&self) -> &File {
        &self.file
    }

    fn set_offloads(&self, flags: u32) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        check(unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                TUNSETOFFLOAD.into(),
                libc::c_ulong::from(flags),
            )
        })
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        let mut request = empty_request();
        let flag = if attached {
            IFF_ATTACH_QUEUE
        } else {
            IFF_DETACH_QUEUE
        };
        request.ifr_ifru.ifru_flags = flag as libc::c_short;
        // SAFETY: TUNSETQUEUE reads one ifreq, which lives through the call.
        check(unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                TUNSETQUEUE.into(),
                &raw const request,
            )
        })
    }
}

fn interface_request(name: &str) -> Result<libc::ifreq, TapError> {
    let mut request = empty_request();
    // The last byte stays zero.
    if name.is_empty() || name.len() >= request.ifr_name.len() || name.contains('\0') {
        return Err(TapError::Name(name.to_owned()));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn empty_request() -> libc::ifreq {
    libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 },
    }
}

fn check(returned: libc::c_int) -> io::Result<()> {
    if returned < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
