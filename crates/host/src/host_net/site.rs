//! Sets up and removes interfaces under the lock of the leases.

use std::net::Ipv4Addr;
use std::path::Path;

use clone_api::config::Egress;
use clone_start::vm_dir::GuestAddress;
use clone_vmm::devices::net::Tap;

use super::firewall::{self, ROUTED_MARK};
use super::guard::{Guard, Place};
use super::lease::{Creator, Lease, Leases, Nat};
use super::link::{self, Link, Links};
use super::range::FIRST_SLOT;
use super::{Attachment, BRIDGE, HostNetError, Range, Request, Reserved, USUAL_MTU, host, unusual};

/// The last slot on an owner's bridge, where no address range limits the slots.
const LAST_SLOT: u16 = 0xfffe;

/// The smallest MTU of IPv4's hosts that is of any use (RFC 791); a way out with less is odd.
const LEAST_MTU: u32 = 576;

/// The locked leases, and access to the interfaces that they describe.
pub(super) struct Site {
    leases: Leases,
    links: Links,
}

/// The bridge that an interface joins.
#[derive(Clone, Copy)]
struct Bridge<'a> {
    name: &'a str,
    link: Link,
    /// The range of addresses on the bridge, if we assign them.
    range: Option<Range>,
    /// The addresses of the range that are given to those alone who name them.
    reserved: Option<&'a Reserved>,
    mtu: u32,
}

impl Site {
    pub(super) fn open(dir: &Path) -> Result<Self, HostNetError> {
        Ok(Self {
            leases: Leases::lock(dir)?,
            links: Links::open()?,
        })
    }

    pub(super) fn attach_bridge(
        &self,
        request: &Request,
        name: &str,
    ) -> Result<Attachment, HostNetError> {
        let link = self
            .links
            .find(name)?
            .ok_or_else(|| HostNetError::NoSuchLink(name.to_owned()))?;
        if !link.is_bridge {
            return Err(HostNetError::NotABridge(name.to_owned()));
        }
        let bridge = Bridge {
            name,
            link,
            range: None,
            reserved: None,
            mtu: link.mtu.unwrap_or(USUAL_MTU),
        };
        let mut attachment = self.attach(request, bridge)?;
        if request.addresses.is_empty() {
            attachment.notices.push(format!(
                "on the bridge {name} the guest may use any address that neither this host nor a \
                 router of its has there; address=ADDRESS holds it to its own"
            ));
        }
        Ok(attachment)
    }

    pub(super) fn attach_nat(
        &self,
        request: &Request,
        wanted: Option<Range>,
        reserved: Option<&Reserved>,
    ) -> Result<Attachment, HostNetError> {
        let (range, link) = self.ensure_bridge(wanted)?;
        let attached = host::enable_forwarding().and_then(|changed| {
            let mtu = self.links.uplink_mtu()?.unwrap_or(USUAL_MTU);
            let bridge = Bridge {
                name: BRIDGE,
                link,
                range: Some(range),
                reserved,
                mtu: mtu.clamp(LEAST_MTU, USUAL_MTU),
            };
            let mut attachment = self.attach(request, bridge)?;
            if changed {
                attachment.notices.push(
                    "turned on forwarding for the whole host (net.ipv4.ip_forward = 1); it stays on"
                        .to_owned(),
                );
            }
            Ok(attachment)
        });
        if attached.is_err() {
            self.undo(self.remove_if_unused());
        }
        attached
    }

    /// Finds or makes our own bridge.
    fn ensure_bridge(&self, wanted: Option<Range>) -> Result<(Range, Link), HostNetError> {
        let found = self.links.find(BRIDGE)?;
        let recorded = self.leases.nat()?;
        let range = match (&recorded, found) {
            (Some(nat), Some(bridge)) => return Ok((nat.range, bridge)),
            // If the bridge was removed under running guests, they keep their addresses.
            (Some(nat), None) => nat.range,
            (None, Some(_)) if !self.leases.has_nat() => {
                return Err(HostNetError::Foreign(BRIDGE.to_owned()));
            }
            (None, Some(_)) => {
                self.links.delete(BRIDGE)?;
                self.free_range(wanted)?
            }
            (None, None) => self.free_range(wanted)?,
        };
        self.leases.set_nat(&Nat { range })?;
        let created = self
            .links
            .route_only_marked(BRIDGE, ROUTED_MARK)
            .and_then(|()| self.links.create_bridge(BRIDGE, &range));
        match created {
            Ok(bridge) => Ok((range, bridge)),
            Err(error) => {
                self.undo(self.remove_if_unused());
                Err(error)
            }
        }
    }

    fn free_range(&self, wanted: Option<Range>) -> Result<Range, HostNetError> {
        match wanted {
            Some(range) => Ok(range),
            None => Range::first_free(&self.links.networks_in_use()?),
        }
    }

    /// Sets up a guarded tap on a bridge, and assigns an address if the bridge has a range.
    fn attach(&self, request: &Request, bridge: Bridge<'_>) -> Result<Attachment, HostNetError> {
        let lease = self.lease(request, bridge)?;
        self.leases.add(&lease)?;
        match self.set_up(&lease, bridge, request.queues) {
            Ok((taps, notices)) => Ok(Attachment {
                taps,
                tap_name: lease.tap(),
                mac: lease.mac,
                mtu: unusual(Some(bridge.mtu)),
                address: bridge.range.map(|range| GuestAddress {
                    address: range.at(lease.slot),
                    prefix: range.prefix(),
                    gateway: range.gateway(),
                    name_servers: host::name_servers(),
                }),
                notices,
            }),
            Err(error) => {
                // The tap disappears with its descriptors, but a child that this process is just
                // starting may hold copies for a moment.
                self.undo(self.links.delete(&lease.tap()));
                self.undo(firewall::dismiss(
                    &self.leases,
                    std::slice::from_ref(&lease),
                ));
                self.undo(self.leases.remove(lease.slot));
                self.undo(self.remove_if_unused());
                Err(error)
            }
        }
    }

    fn lease(&self, request: &Request, bridge: Bridge<'_>) -> Result<Lease, HostNetError> {
        let last = bridge.range.map_or(LAST_SLOT, |range| range.last_slot());
        // An interface without a lease belongs to another program.
        let has_no_tap = |slot| Ok(self.links.find(&Lease::tap_name(slot))?.is_none());
        let wanted = request.address.zip(bridge.range);
        let wanted = wanted.and_then(|(address, range)| range.slot_of(address));
        let wanted = match wanted {
            Some(slot) => self.leases.free_slot(slot..=slot, has_no_tap).ok(),
            None => None,
        };
        let is_reserved = |slot| {
            let address = bridge.range.map(|range| range.at(slot));
            let reserved = bridge.reserved.zip(address);
            reserved.is_some_and(|(reserved, address)| reserved.contains(address))
        };
        let slot = match wanted {
            Some(slot) => slot,
            None => self.leases.free_slot(FIRST_SLOT..=last, |slot| {
                Ok(!is_reserved(slot) && has_no_tap(slot)?)
            })?,
        };
        let address = bridge.range.map(|range| range.at(slot));
        // It stays with the VM wherever that moves, so it must not depend on this host's addresses.
        let mac = match request.mac {
            Some(mac) => mac,
            None => link::random_mac().map_err(HostNetError::Netlink)?,
        };
        Ok(Lease {
            vm: request.vm.clone(),
            slot,
            mac,
            address,
            bridge: address.is_none().then(|| bridge.name.to_owned()),
            held_to: request.addresses.clone(),
            connections: request.connections,
            neighbours: request.neighbours,
            reach_host: request.reach_host,
            egress: request.egress.clone(),
            creator: Creator::this_process(),
        })
    }

    /// Makes the rules and the tap, and returns notices about other rules that block the guest.
    fn set_up(
        &self,
        lease: &Lease,
        bridge: Bridge<'_>,
        queues: u16,
    ) -> Result<(Vec<Tap>, Vec<String>), HostNetError> {
        let all = self.leases.contents()?.leases;
        let notices = match bridge.range {
            Some(range) => {
                let notices = self.ensure_rules(&all, range)?;
                firewall::admit(&self.leases, lease, &all, &range)?;
                notices
            }
            None => Vec::new(),
        };
        if all.iter().any(Lease::is_of_older_version) {
            self.guard_all(&all)?;
            firewall::remove_older()?;
        }
        if let Some(address) = lease.address {
            self.links.forget(bridge.link, address)?;
        }
        let taps = Tap::open(&lease.tap(), queues)?;
        let guard = self.guard_of(lease, &all)?;
        let port = (bridge.name, bridge.link);
        self.links.join(&lease.tap(), port, bridge.mtu, &guard)?;
        // The guards of guests that must not receive from this one do not know it yet.
        for other in all.iter().filter(|other| other.is_stranger_to(lease)) {
            self.guard_if_there(other, &all)?;
        }
        Ok((taps, notices))
    }

    /// Makes the missing rules for guests behind NAT, and returns notices about other rules that
    /// block them.
    fn ensure_rules(&self, all: &[Lease], range: Range) -> Result<Vec<String>, HostNetError> {
        if let Some(notices) = firewall::whole(&self.leases)? {
            return Ok(notices);
        }
        // The program that removed rules may have removed this one too, and the table of an older
        // version is replaced.
        self.links.route_only_marked(BRIDGE, ROUTED_MARK)?;
        self.links.guard_bridge(BRIDGE)?;
        self.guard_all(all)?;
        firewall::make(&self.leases, all, &range)
    }

    pub(super) fn repair(&self) -> Result<bool, HostNetError> {
        let Some(nat) = self.leases.nat()? else {
            return Ok(false);
        };
        if self.links.find(BRIDGE)?.is_none() || firewall::is_whole(&self.leases)? {
            return Ok(false);
        }
        let all = self.leases.contents()?.leases;
        self.ensure_rules(&all, nat.range)?;
        Ok(true)
    }

    pub(super) fn restrict(
        &self,
        vm: &str,
        egress: &Egress,
        reach_host: bool,
    ) -> Result<(), HostNetError> {
        let mut all = self.leases.contents()?.leases;
        let mut changed = Vec::new();
        for lease in all.iter_mut().filter(|lease| lease.vm == vm) {
            lease.egress = egress.clone();
            if lease.reach_host != reach_host {
                lease.reach_host = reach_host;
                changed.push(lease.clone());
            }
            // A later repair guards the tap as the lease says.
            self.leases.add(lease)?;
        }
        for lease in changed.iter().filter(|lease| lease.address.is_some()) {
            let range = self.leases.nat()?.ok_or(HostNetError::NoRange)?.range;
            firewall::set_reach_host(&self.leases, lease, &all, &range)?;
        }
        for lease in all.iter().filter(|lease| lease.vm == vm) {
            let guard = self.guard_of(lease, &all)?;
            self.links.guard(&lease.tap(), &guard)?;
        }
        Ok(())
    }

    fn guard_all(&self, all: &[Lease]) -> Result<(), HostNetError> {
        all.iter()
            .try_for_each(|lease| self.guard_if_there(lease, all))
    }

    /// Guards the lease's tap if it exists. A tap that does not exist yet is guarded when it is
    /// made.
    fn guard_if_there(&self, lease: &Lease, all: &[Lease]) -> Result<(), HostNetError> {
        let guard = self.guard_of(lease, all)?;
        match self.links.guard(&lease.tap(), &guard) {
            Err(HostNetError::NoSuchLink(_)) => Ok(()),
            result => result,
        }
    }

    fn guard_of<'a>(&self, lease: &'a Lease, all: &[Lease]) -> Result<Guard<'a>, HostNetError> {
        let place = match lease.address {
            Some(address) => Place::Nat {
                address,
                range: self.leases.nat()?.ok_or(HostNetError::NoRange)?.range,
            },
            None => Place::Bridge {
                addresses: &lease.held_to,
                reserved: self.reserved(lease)?,
                strangers: all
                    .iter()
                    .filter(|other| other.is_stranger_to(lease))
                    .map(|other| other.mac)
                    .collect(),
            },
        };
        Ok(Guard {
            mac: lease.mac,
            place,
            neighbours: lease.neighbours,
            egress: &lease.egress,
        })
    }

    fn reserved(&self, lease: &Lease) -> Result<Vec<Ipv4Addr>, HostNetError> {
        let bridge = lease.bridge.as_deref().unwrap_or_default();
        match self.links.find(bridge)? {
            Some(link) => self.links.hosts_and_routers_on(link),
            None => Ok(Vec::new()),
        }
    }

    /// Removes the interfaces of the leases chosen by `which`, and damaged leases.
    pub(super) fn release(
        leases: Leases,
        which: impl Fn(&Lease) -> bool,
    ) -> Result<Vec<String>, HostNetError> {
        let contents = leases.contents()?;
        let (released, kept): (Vec<_>, Vec<_>) = contents.leases.into_iter().partition(which);
        let something = !released.is_empty() || !contents.damaged.is_empty();
        let last = kept.is_empty() && (something || leases.has_nat());
        if !something && !last {
            return Ok(Vec::new());
        }
        let site = Self {
            leases,
            links: Links::open()?,
        };
        let slots = released.iter().map(|lease| lease.slot);
        for slot in slots.clone().chain(contents.damaged.iter().copied()) {
            site.links.delete(&Lease::tap_name(slot))?;
        }
        if last {
            if released.iter().any(Lease::is_of_older_version) {
                firewall::remove_older()?;
            }
            site.remove_shared()?;
        } else {
            firewall::dismiss(&site.leases, &released)?;
        }
        for slot in slots.chain(contents.damaged.iter().copied()) {
            site.leases.remove(slot)?;
        }
        Ok(released.into_iter().map(|lease| lease.vm).collect())
    }

    /// Removes bridge and rules if no lease is left.
    fn remove_if_unused(&self) -> Result<(), HostNetError> {
        let contents = self.leases.contents()?;
        if contents.leases.is_empty() && contents.damaged.is_empty() {
            return self.remove_shared();
        }
        Ok(())
    }

    fn remove_shared(&self) -> Result<(), HostNetError> {
        if !self.leases.has_nat() {
            return Ok(());
        }
        let cleared = firewall::clear(&self.leases);
        self.links.delete(BRIDGE)?;
        self.links.route_all(BRIDGE, ROUTED_MARK)?;
        cleared?;
        self.leases.remove_nat()
    }

    /// Logs a failure while undoing, so that it does not hide the first failure, which the user
    /// needs to see.
    fn undo(&self, result: Result<(), HostNetError>) {
        if let Err(error) = result {
            tracing::warn!(%error, "left something of a network interface behind; the next command sweeps it");
        }
    }
}
