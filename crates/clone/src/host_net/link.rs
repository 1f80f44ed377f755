//! Interfaces, bridges and addresses, by netlink.
//!
//! The calls block; the asynchronous machinery under them lives and dies with [`Links`].

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use clone_api::MacAddr;
use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute};
use rtnetlink::{Handle, LinkBridge, LinkBridgePort, LinkUnspec, RouteMessageBuilder};
use tokio::runtime::{Builder, Runtime};

use super::HostNetError;
use super::range::Range;

/// A network interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) is_bridge: bool,
    /// Bytes.
    pub(super) mtu: Option<u32>,
}

/// The network configuration of the namespace that this process is in.
pub(super) struct Links {
    runtime: Runtime,
    handle: Handle,
}

impl Links {
    pub(super) fn open() -> Result<Self, HostNetError> {
        let runtime = Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(HostNetError::Netlink)?;
        let connection = {
            let _entered = runtime.enter();
            rtnetlink::new_connection().map_err(HostNetError::Netlink)?
        };
        let (connection, handle, _) = connection;
        runtime.spawn(connection);
        Ok(Self { runtime, handle })
    }

    /// The interface `name`, if there is one.
    pub(super) fn find(&self, name: &str) -> Result<Option<Link>, HostNetError> {
        let query = self.handle.link().get().match_name(name).execute();
        match self
            .runtime
            .block_on(async { std::pin::pin!(query).try_next().await })
        {
            Ok(message) => Ok(message.map(|message| link_of(&message))),
            Err(error) => match os_error(error) {
                error if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
                error => Err(failed("look for the interface", name)(error)),
            },
        }
    }

    /// Creates a bridge that is up, with the range's first address.
    pub(super) fn create_bridge(&self, name: &str, range: &Range) -> Result<Link, HostNetError> {
        // With an address of its own the bridge does not take that of whichever port comes first.
        let mac = Range::mac_of(range.gateway());
        let message = LinkBridge::new(name)
            .address(mac.0.to_vec())
            .forward_delay(0)
            .up()
            .build();
        self.run(self.handle.link().add(message).execute())
            .map_err(failed("create the bridge", name))?;
        let link = self
            .find(name)?
            .ok_or_else(|| HostNetError::NoSuchLink(name.to_owned()))?;
        let address = IpAddr::V4(range.gateway());
        let add = self
            .handle
            .address()
            .add(link.index, address, range.prefix());
        self.run(add.execute())
            .map_err(failed("give its address to the bridge", name))?;
        Ok(link)
    }

    /// Makes the interface `port` a port of `bridge` and sets it up.
    pub(super) fn join(
        &self,
        port: &str,
        bridge: (&str, Link),
        isolated: bool,
    ) -> Result<(), HostNetError> {
        let (bridge_name, bridge) = bridge;
        let link = self
            .find(port)?
            .ok_or_else(|| HostNetError::NoSuchLink(port.to_owned()))?;
        let mut join = LinkUnspec::new_with_index(link.index).controller(bridge.index);
        if let Some(mtu) = bridge.mtu {
            join = join.mtu(mtu);
        }
        self.run(self.handle.link().set(join.build()).execute())
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EXFULL) => HostNetError::BridgeFull(bridge_name.to_owned()),
                _ => failed("put it on the bridge: the tap", port)(error),
            })?;
        if isolated {
            let flags = LinkBridgePort::new(link.index).isolated(true).build();
            self.run(self.handle.link().set_port(flags).execute())
                .map_err(failed("isolate from other guests the tap", port))?;
        }
        // Last, so that nothing passes before its flags are set.
        let up = LinkUnspec::new_with_index(link.index).up().build();
        self.run(self.handle.link().set(up).execute())
            .map_err(failed("bring up the tap", port))
    }

    /// Deletes the interface `name`, if it is there.
    pub(super) fn delete(&self, name: &str) -> Result<(), HostNetError> {
        let Some(link) = self.find(name)? else {
            return Ok(());
        };
        match self.run(self.handle.link().del(link.index).execute()) {
            // It went by itself meanwhile, with the last descriptor of its tap.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            result => result.map_err(failed("delete the interface", name)),
        }
    }

    /// The IPv4 networks that this host has addresses in or routes to: network and prefix length.
    pub(super) fn networks_in_use(&self) -> Result<Vec<(Ipv4Addr, u8)>, HostNetError> {
        let addresses = self.handle.address().get().execute();
        let addresses: Vec<_> = self
            .collect(addresses)
            .map_err(failed("list the addresses of", "this host"))?;
        let routes = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let routes: Vec<_> = self
            .collect(self.handle.route().get(routes).execute())
            .map_err(failed("list the routes of", "this host"))?;
        let mut networks = Vec::new();
        for message in addresses {
            for attribute in message.attributes {
                if let AddressAttribute::Local(IpAddr::V4(address)) = attribute {
                    networks.push((address, message.header.prefix_len));
                }
            }
        }
        for message in routes {
            let prefix = message.header.destination_prefix_length;
            if message.header.address_family != AddressFamily::Inet || prefix == 0 {
                continue;
            }
            for attribute in message.attributes {
                if let RouteAttribute::Destination(RouteAddress::Inet(address)) = attribute {
                    networks.push((address, prefix));
                }
            }
        }
        Ok(networks)
    }

    fn run(&self, request: impl Future<Output = Result<(), rtnetlink::Error>>) -> io::Result<()> {
        self.runtime.block_on(request).map_err(os_error)
    }

    fn collect<T>(
        &self,
        answers: impl futures_util::Stream<Item = Result<T, rtnetlink::Error>>,
    ) -> io::Result<Vec<T>> {
        self.runtime
            .block_on(answers.try_collect())
            .map_err(os_error)
    }
}

fn link_of(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        is_bridge: false,
        mtu: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Mtu(mtu) => link.mtu = Some(*mtu),
            LinkAttribute::LinkInfo(infos) => {
                link.is_bridge |= infos.contains(&LinkInfo::Kind(InfoKind::Bridge));
            }
            _ => {}
        }
    }
    link
}

fn os_error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

fn failed(action: &'static str, object: &str) -> impl FnOnce(io::Error) -> HostNetError {
    let object = object.to_owned();
    move |source| match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => HostNetError::NotAllowed { action, object },
        _ => HostNetError::Link {
            action,
            object,
            source,
        },
    }
}

/// A hardware address for a guest on a bridge that is not ours.
pub(super) fn random_mac() -> io::Result<MacAddr> {
    let mut random = [0; 5];
    io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut random)?;
    Ok(MacAddr::from_random(random))
}
