//! The errors of setting up the host's network.

use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use clone_api::MacAddr;
use clone_vmm::devices::net::TapError;

/// A failure to set up or clear up the host's side of a VM's network.
#[derive(Debug, thiserror::Error)]
pub enum HostNetError {
    /// An operation on the lease directory failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Lease {
        /// The action that failed, as in "lock".
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A netlink socket could not be opened.
    #[error("cannot talk to the kernel's network configuration (netlink): {0}")]
    Netlink(#[source] io::Error),
    /// The kernel refuses to change or show an interface.
    #[error("cannot {action} {object}: {source}")]
    Link {
        /// The action that failed, as in "create the bridge".
        action: &'static str,
        /// The interface or address.
        object: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The process may not configure networks.
    #[error(
        "{action} {object} needs the right to configure networks (CAP_NET_ADMIN): run as root, \
         or name a tap that was made for you, or do without a network"
    )]
    NotAllowed {
        /// The action that failed.
        action: &'static str,
        /// The interface or address.
        object: String,
    },
    /// The named bridge does not exist.
    #[error("there is no network interface {0}")]
    NoSuchLink(String),
    /// The named interface is not a bridge.
    #[error("{0} is not a bridge")]
    NotABridge(String),
    /// The kernel cannot run the programs that enforce the guests' rules.
    #[error(
        "this kernel cannot judge what guests send (it needs CONFIG_NET_SCH_INGRESS and \
         CONFIG_NET_CLS_BPF, the modules sch_ingress and cls_bpf): {0}; with tap=NAME a guest uses \
         a tap that you made and guard yourself"
    )]
    NoTrafficControl(#[source] io::Error),
    /// Guests behind NAT have leases, but the record of their network is missing or damaged.
    #[error(
        "the record of the guests' address range is missing or damaged (the file nat in the lease \
         directory): stop the VMs that use --net nat, and start them again"
    )]
    NoRange,
    /// Another station of the bridge has the hardware address.
    #[error(
        "the hardware address {0} is in use on this bridge; leave out mac=, or give another one"
    )]
    MacInUse(MacAddr),
    /// A setting of the kernel's network could not be changed.
    #[error("cannot change the setting {setting}: {source}")]
    Setting {
        /// The setting, as sysctl names it.
        setting: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A bridge accepts no more ports.
    #[error("the bridge {0} is full: Linux allows 1,023 ports on one")]
    BridgeFull(String),
    /// An interface with a name of ours exists, but we did not make it.
    #[error(
        "the network interface {0} exists but is not ours (no record of it in the lease \
         directory); remove it, or use another bridge"
    )]
    Foreign(String),
    /// Every range is in use on this host.
    #[error("every address range that guests could have is in use on this host: {0}")]
    NoFreeRange(String),
    /// Every address is leased.
    #[error("no address is left for another guest")]
    NoFreeAddress,
    /// `nft` is not installed.
    #[error(
        "the program nft was not found: install the nftables package, or use bridge=NAME or \
         tap=NAME, which do without it"
    )]
    NftMissing,
    /// `nft` failed.
    #[error("nft could not {action}: {stderr}")]
    Nft {
        /// The action that failed.
        action: &'static str,
        /// The error output of `nft`.
        stderr: String,
    },
    /// Forwarding could not be turned on.
    #[error("cannot turn on forwarding (net.ipv4.ip_forward): {0}")]
    Forwarding(#[source] io::Error),
    /// The tap could not be opened.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A hardware address that no station can have.
    #[error("{0} is a multicast address, which no network interface can have")]
    MulticastMac(String),
    /// The requested address range cannot be used.
    #[error("{address}/{prefix} is no range for guests: a private network of /16 to /28 is")]
    BadRange {
        /// The network's address.
        address: Ipv4Addr,
        /// The prefix length.
        prefix: u8,
    },
}
