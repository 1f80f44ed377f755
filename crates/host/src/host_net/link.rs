//! Interfaces, bridges and addresses, by netlink.
//!
//! The calls block. Each [`Links`] has its own async runtime for the netlink library.

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use clone_api::MacAddr;
use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{
    Handle, LinkBridge, LinkBridgePort, LinkUnspec, RouteMessageBuilder, RuleAddRequest,
};
use tokio::runtime::{Builder, Runtime};

use super::guard::{self, Encoded, Guard};
use super::range::Range;
use super::tc::{self, Hook};
use super::{HostNetError, host};

/// The priority of our routing rule: after the rule for the host's own addresses, before all
/// others.
const RULE_PRIORITY: u32 = 13;

/// A network interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) is_bridge: bool,
    /// The MTU in bytes.
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
        // A bridge without its own hardware address takes the one of its first port.
        let mac = range.gateway_mac();
        let message = LinkBridge::new(name)
            .address(mac.0.to_vec())
            .forward_delay(0)
            .build();
        self.run(self.handle.link().add(message).execute())
            .map_err(failed("create the bridge", name))?;
        let link = self.existing(name)?;
        self.guard_bridge(name)?;
        self.set(LinkUnspec::new_with_index(link.index).up().build())
            .map_err(failed("bring up the bridge", name))?;
        let address = IpAddr::V4(range.gateway());
        let add = self
            .handle
            .address()
            .add(link.index, address, range.prefix());
        self.run(add.execute())
            .map_err(failed("give its address to the bridge", name))?;
        Ok(link)
    }

    /// Keeps our own bridge from sending packets that did not pass the packet filter, and limits
    /// the frames that the host receives on it.
    pub(super) fn guard_bridge(&self, name: &str) -> Result<(), HostNetError> {
        host::harden_bridge(name)?;
        let index = self.existing(name)?.index;
        self.judge(name, index, Hook::Egress, &guard::only_filtered())
    }

    /// Makes the interface `port` a port of `bridge`, guarded by `guard`, and sets it up.
    ///
    /// The bridge has a static entry for the guest, and learns nothing from the guest's frames. The
    /// host has no address on the port, and uses no protocol there.
    pub(super) fn join(
        &self,
        port: &str,
        bridge: (&str, Link),
        mtu: u32,
        guard: &Guard<'_>,
    ) -> Result<(), HostNetError> {
        let (bridge_name, bridge) = bridge;
        let link = self.existing(port)?;
        host::silence(port)?;
        self.guard(port, guard)?;
        let join = LinkUnspec::new_with_index(link.index)
            .arp(false)
            .mtu(mtu)
            .controller(bridge.index);
        self.set(join.build())
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EXFULL) => HostNetError::BridgeFull(bridge_name.to_owned()),
                _ => failed("put it on the bridge: the tap", port)(error),
            })?;
        let flags = LinkBridgePort::new(link.index)
            .isolated(!guard.neighbours)
            .learning(false)
            .flood(false)
            .mcast_flood(guard.hears_groups())
            .guard(true)
            .root_block(true);
        self.run(self.handle.link().set_port(flags.build()).execute())
            .map_err(failed("set the bridge's rules for the tap", port))?;
        self.pin(port, link, bridge, guard.mac)?;
        // The tap is brought up last, so that no frame passes before everything is set.
        self.set(LinkUnspec::new_with_index(link.index).up().build())
            .map_err(failed("bring up the tap", port))
    }

    /// Replaces the rules of the interface `port` by `guard`.
    pub(super) fn guard(&self, port: &str, guard: &Guard<'_>) -> Result<(), HostNetError> {
        let index = self.existing(port)?.index;
        self.judge(port, index, Hook::Egress, &guard.egress())?;
        self.judge(port, index, Hook::Ingress, &guard.ingress())
    }

    /// Adds a static entry to the bridge: the station `mac` is at `port`, even if the bridge has
    /// seen it elsewhere, as it has one that comes from another host.
    fn pin(&self, port: &str, link: Link, bridge: Link, mac: MacAddr) -> Result<(), HostNetError> {
        let failed = |error| failed("pin the guest's address to the tap", port)(error);
        let entry = || {
            self.handle
                .neighbours()
                .add_bridge(link.index, &mac.0)
                .state(NeighbourState::Noarp)
                .flags(NeighbourFlags::Controller | NeighbourFlags::Sticky)
        };
        match self.run(entry().execute()) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                match self.is_pinned(bridge, mac).map_err(failed)? {
                    true => Err(HostNetError::MacInUse(mac)),
                    false => self.run(entry().replace().execute()).map_err(failed),
                }
            }
            added => added.map_err(failed),
        }
    }

    /// Whether somebody has said where the station `mac` is on the bridge, which then does not learn
    /// it from frames.
    fn is_pinned(&self, bridge: Link, mac: MacAddr) -> io::Result<bool> {
        let query = self.handle.neighbours().get();
        let query = query.set_address_family(AddressFamily::Bridge).execute();
        let entries = self.collect(query)?;
        let mac = NeighbourAttribute::LinkLayerAddress(mac.0.to_vec());
        let bridge = NeighbourAttribute::Controller(bridge.index);
        Ok(entries.iter().any(|entry| {
            let state = entry.header.state;
            let is_static = matches!(state, NeighbourState::Noarp | NeighbourState::Permanent);
            is_static && entry.attributes.contains(&mac) && entry.attributes.contains(&bridge)
        }))
    }

    /// Makes the host ask for the hardware address of `address` on `bridge` again: it may know the one
    /// of the guest that had the address before.
    pub(super) fn forget(&self, bridge: Link, address: Ipv4Addr) -> Result<(), HostNetError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = bridge.index;
        let destination = NeighbourAddress::Inet(address);
        message.attributes = vec![NeighbourAttribute::Destination(destination)];
        match self.run(self.handle.neighbours().del(message).execute()) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => {
                Err(failed("forget the former station of", &address.to_string())(error))
            }
            _ => Ok(()),
        }
    }

    /// Prevents packets of guests from being routed unless they passed the packet filter, which
    /// sets `mark`. Repeating the call changes nothing.
    pub(super) fn route_only_marked(&self, bridge: &str, mark: u32) -> Result<(), HostNetError> {
        match self.run(self.marked_rule(bridge, mark).execute()) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            // This kernel has no such rules. Packets can then leave, but answers cannot return.
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => Ok(()),
            result => result.map_err(failed("set up a routing rule for", bridge)),
        }
    }

    /// Undoes [`Links::route_only_marked`].
    pub(super) fn route_all(&self, bridge: &str, mark: u32) -> Result<(), HostNetError> {
        let rule = self.marked_rule(bridge, mark).message_mut().clone();
        match self.run(self.handle.rule().del(rule).execute()) {
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENOENT | libc::EAFNOSUPPORT)
                ) =>
            {
                Ok(())
            }
            result => result.map_err(failed("remove the routing rule for", bridge)),
        }
    }

    fn marked_rule(&self, bridge: &str, mark: u32) -> RuleAddRequest<Ipv4Addr> {
        let mut rule = self
            .handle
            .rule()
            .add()
            .v4()
            .input_interface(bridge)
            .priority(RULE_PRIORITY)
            .fw_mark(0)
            .action(RuleAction::Blackhole);
        let message = rule.message_mut();
        message.header.table = RouteHeader::RT_TABLE_UNSPEC;
        message.attributes.push(RuleAttribute::FwMask(mark));
        rule
    }

    /// The MTU in bytes of this host's default route; `None` if it has none.
    pub(super) fn uplink_mtu(&self) -> Result<Option<u32>, HostNetError> {
        // No host has this address (TEST-NET-2), so the answer is the default route.
        let anywhere = Ipv4Addr::new(198, 51, 100, 1);
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(anywhere, 32)
            .build();
        let Ok(answers) = self.request(RouteNetlinkMessage::GetRoute(route), 0) else {
            return Ok(None);
        };
        for answer in answers {
            if let RouteNetlinkMessage::NewRoute(route) = answer {
                return self.route_mtu(&route).map(Some);
            }
        }
        Ok(None)
    }

    fn route_mtu(&self, route: &RouteMessage) -> Result<u32, HostNetError> {
        let mut mtu = u32::MAX;
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Oif(index) => {
                    let query = self.handle.link().get().match_index(*index).execute();
                    let links: Vec<_> = self
                        .collect(query)
                        .map_err(failed("look at the interface", "to the world"))?;
                    let of_link = links.first().and_then(|message| link_of(message).mtu);
                    mtu = mtu.min(of_link.unwrap_or(u32::MAX));
                }
                RouteAttribute::Metrics(metrics) => {
                    for metric in metrics {
                        if let RouteMetric::Mtu(of_route) = metric {
                            mtu = mtu.min(*of_route);
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(mtu)
    }

    /// The addresses that this host has on the interface `link`, and those of the routers that it
    /// reaches there.
    pub(super) fn hosts_and_routers_on(&self, link: Link) -> Result<Vec<Ipv4Addr>, HostNetError> {
        let mut known = Vec::new();
        for message in self.addresses()? {
            if message.header.index != link.index {
                continue;
            }
            known.extend(message.attributes.iter().filter_map(|it| match it {
                AddressAttribute::Local(IpAddr::V4(address)) => Some(*address),
                _ => None,
            }));
        }
        for route in self.routes()? {
            let here = RouteAttribute::Oif(link.index);
            if !route.attributes.contains(&here) {
                continue;
            }
            known.extend(route.attributes.iter().filter_map(|it| match it {
                RouteAttribute::Gateway(RouteAddress::Inet(address)) => Some(*address),
                _ => None,
            }));
        }
        known.sort_unstable();
        known.dedup();
        Ok(known)
    }

    /// Deletes the interface `name`, if it exists.
    pub(super) fn delete(&self, name: &str) -> Result<(), HostNetError> {
        let Some(link) = self.find(name)? else {
            return Ok(());
        };
        match self.run(self.handle.link().del(link.index).execute()) {
            // The tap has disappeared meanwhile, with its last descriptor.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            result => result.map_err(failed("delete the interface", name)),
        }
    }

    /// The IPv4 networks that this host has addresses in or routes to: network and prefix length.
    pub(super) fn networks_in_use(&self) -> Result<Vec<(Ipv4Addr, u8)>, HostNetError> {
        let mut networks = Vec::new();
        for message in self.addresses()? {
            for attribute in message.attributes {
                if let AddressAttribute::Local(IpAddr::V4(address)) = attribute {
                    networks.push((address, message.header.prefix_len));
                }
            }
        }
        for message in self.routes()? {
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

    fn addresses(&self) -> Result<Vec<AddressMessage>, HostNetError> {
        self.collect(self.handle.address().get().execute())
            .map_err(failed("list the addresses of", "this host"))
    }

    fn routes(&self) -> Result<Vec<RouteMessage>, HostNetError> {
        let all = RouteMessageBuilder::<Ipv4Addr>::new().build();
        self.collect(self.handle.route().get(all).execute())
            .map_err(failed("list the routes of", "this host"))
    }

    fn existing(&self, name: &str) -> Result<Link, HostNetError> {
        self.find(name)?
            .ok_or_else(|| HostNetError::NoSuchLink(name.to_owned()))
    }

    fn set(&self, message: LinkMessage) -> io::Result<()> {
        self.run(self.handle.link().set(message).execute())
    }

    /// Sends a message that `rtnetlink` has no function for, and returns the answers.
    fn request(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        let answers = self.handle.clone().request(request).map_err(os_error)?;
        let answers: Vec<_> = self.runtime.block_on(answers.collect());
        let mut contents = Vec::new();
        for answer in answers {
            match answer.payload {
                // An acknowledgement is an error without a code.
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::InnerMessage(message) => contents.push(message),
                _ => {}
            }
        }
        Ok(contents)
    }

    /// Replaces the program that filters the frames of an interface. The replacement is atomic: no
    /// unfiltered frame passes in between.
    fn judge(
        &self,
        interface: &str,
        index: u32,
        hook: Hook,
        program: &Encoded,
    ) -> Result<(), HostNetError> {
        let index = index as i32;
        let judged = self.add_hooks(index).and_then(|()| {
            let mut filters = tc::filters(index, hook, program).into_iter();
            filters.try_for_each(|filter| self.acknowledged(filter, NLM_F_CREATE))
        });
        judged.map_err(|source| match source.raw_os_error() {
            Some(libc::ENOENT | libc::EOPNOTSUPP) => HostNetError::NoTrafficControl(source),
            _ => failed("guard the interface", interface)(source),
        })
    }

    fn add_hooks(&self, index: i32) -> io::Result<()> {
        match self.acknowledged(tc::hooks(index), NLM_F_CREATE | NLM_F_EXCL) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            result => result,
        }
    }

    fn acknowledged(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.request(message, NLM_F_ACK | flags).map(|_| ())
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

/// Makes a random hardware address for a guest.
pub(super) fn random_mac() -> io::Result<MacAddr> {
    clone_base::random::bytes().map(MacAddr::from_random)
}
