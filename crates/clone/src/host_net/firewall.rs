//! The packet filter: address translation for the bridge of our own, and a guard on every tap
//! that lets a guest send only under its own addresses.
//!
//! All of it is in two tables named `clone` (families `inet` and `bridge`), which are ours alone;
//! other tables are neither read nor touched. Other tables' rules still hold beside them: a
//! host firewall that drops forwarded packets drops the guests' too.

use std::fmt::Write as _;
use std::io::{self, ErrorKind, Write as _};
use std::process::{Command, Stdio};

use clone_api::Ipv4Network;
use clone_api::config::Egress;

use super::lease::Lease;
use super::range::Range;
use super::{BRIDGE, HostNetError};

/// Lets one more guest send. The tables are made anew where they are not whole.
pub(super) fn admit(
    lease: &Lease,
    all: &[Lease],
    range: Option<&Range>,
) -> Result<(), HostNetError> {
    let mut script = String::new();
    if range.is_some() {
        // Fails where the table is missing, changes nothing where all is well.
        script.push_str("add chain inet clone postrouting\n");
    }
    push_element(&mut script, "add", lease);
    match run(&script, "admit a guest") {
        Err(HostNetError::Nft { .. }) => rebuild(all, range),
        result => result,
    }
}

/// Holds guests to what their leases say, of which each comes with what it said before.
pub(super) fn restrict(
    changed: &[(Egress, Lease)],
    all: &[Lease],
    range: Option<&Range>,
) -> Result<(), HostNetError> {
    if changed
        .iter()
        .all(|(before, lease)| *before == lease.egress)
    {
        return Ok(());
    }
    let mut script = String::new();
    for (before, lease) in changed {
        // Adding first makes the deletion succeed for an element that is not there.
        push_egress(&mut script, "add", &lease.tap(), before);
        push_egress(&mut script, "delete", &lease.tap(), before);
        push_egress(&mut script, "add", &lease.tap(), &lease.egress);
    }
    match run(&script, "restrict a guest") {
        Err(HostNetError::Nft { .. }) => rebuild(all, range),
        result => result,
    }
}

/// Stops letting a guest send. No tables, no guest: that is no error.
pub(super) fn dismiss(leases: &[Lease]) -> Result<(), HostNetError> {
    if leases.is_empty() {
        return Ok(());
    }
    let mut script = String::new();
    for lease in leases {
        // Adding first makes the deletion succeed for an element that is not there.
        push_element(&mut script, "add", lease);
        push_element(&mut script, "delete", lease);
    }
    match run(&script, "dismiss a guest") {
        Err(HostNetError::Nft { .. }) if !has_table("bridge")? => Ok(()),
        result => result,
    }
}

/// Makes the tables from the leases, in one step.
pub(super) fn rebuild(leases: &[Lease], range: Option<&Range>) -> Result<(), HostNetError> {
    let mut script = clear_script();
    if let Some(range) = range {
        push_nat(&mut script, range);
    }
    push_guard(&mut script, range);
    for lease in leases {
        push_element(&mut script, "add", lease);
    }
    run(&script, "set up its tables")
}

/// Removes the tables, if they are there.
pub(super) fn clear() -> Result<(), HostNetError> {
    run(&clear_script(), "remove its tables")
}

fn clear_script() -> String {
    // Adding first makes the deletion succeed for a table that is not there.
    ["inet", "bridge"]
        .map(|family| format!("add table {family} clone\ndelete table {family} clone\n"))
        .concat()
}

fn push_nat(script: &mut String, range: &Range) {
    // Guests reach the world and the host; the world reaches them only in answer. What stays on
    // the bridge is the guard's affair, and passes here only where br_netfilter is loaded.
    let _ = write!(
        script,
        "table inet clone {{
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname {BRIDGE:?} accept
    oifname {BRIDGE:?} ct state established,related accept
    oifname {BRIDGE:?} drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {range} oifname != {BRIDGE:?} masquerade
  }}
}}
"
    );
}

fn push_guard(script: &mut String, range: Option<&Range>) {
    // No detour by the host to guests that cannot be reached directly.
    let detour = range.map_or_else(String::new, |range| {
        let (gateway, mac) = (range.gateway(), Range::mac_of(range.gateway()));
        format!("    ether daddr {mac} ip daddr {range} ip daddr != {gateway} drop\n")
    });
    // `senders` have an address that we gave them and speak IPv4 and ARP under it alone;
    // `stations`, on bridges that are not ours, are held to their hardware address. From guest to
    // guest only what both take part in passes: a bridge port's own flag (isolated) keeps a guest
    // from another isolated one, but not from those that are not. `held` send to `allowed` only:
    // that comes first, so that it holds stations, too.
    let _ = write!(
        script,
        "table bridge clone {{
  set senders {{ type ifname . ether_addr . ipv4_addr; }}
  set stations {{ type ifname . ether_addr; }}
  set neighbours {{ type ifname; }}
  set held {{ type ifname; }}
  set allowed {{ type ifname . ipv4_addr; flags interval; }}
  chain guard {{
    type filter hook prerouting priority -300; policy accept;
    iifname != \"clone-*\" accept
    iifname @held meta protocol != {{ ip, arp }} drop
    iifname @held iifname . ip daddr != @allowed drop
    iifname . ether saddr @stations accept
{detour}    iifname . ether saddr . ip saddr @senders accept
    iifname . ether saddr . arp saddr ip @senders iifname . arp saddr ether . arp saddr ip @senders accept
    drop
  }}
  chain apart {{
    type filter hook forward priority filter; policy accept;
    iifname \"clone-*\" oifname \"clone-*\" iifname != @neighbours drop
    iifname \"clone-*\" oifname \"clone-*\" oifname != @neighbours drop
  }}
}}
"
    );
}

fn push_element(script: &mut String, verb: &str, lease: &Lease) {
    let (tap, mac) = (lease.tap(), lease.mac);
    // First it is held, then it may send; nobody sees a state between the two.
    push_egress(script, verb, &tap, &lease.egress);
    let _ = match lease.address {
        Some(address) => writeln!(
            script,
            "{verb} element bridge clone senders {{ {tap:?} . {mac} . {address} }}"
        ),
        None => writeln!(
            script,
            "{verb} element bridge clone stations {{ {tap:?} . {mac} }}"
        ),
    };
    if lease.neighbours {
        let _ = writeln!(
            script,
            "{verb} element bridge clone neighbours {{ {tap:?} }}"
        );
    }
}

fn push_egress(script: &mut String, verb: &str, tap: &str, egress: &Egress) {
    if egress.is_full() {
        return;
    }
    let _ = writeln!(script, "{verb} element bridge clone held {{ {tap:?} }}");
    if let Egress::Allow(networks) = egress {
        for network in disjoint(networks) {
            let _ = writeln!(
                script,
                "{verb} element bridge clone allowed {{ {tap:?} . {network} }}"
            );
        }
    }
}

/// The networks without those that are in another one: a set takes no element twice.
fn disjoint(networks: &[Ipv4Network]) -> Vec<Ipv4Network> {
    let mut kept: Vec<Ipv4Network> = Vec::new();
    let mut sorted = networks.to_vec();
    // Who contains others comes before them.
    sorted.sort_unstable();
    for network in sorted {
        if !kept.last().is_some_and(|last| last.contains(network)) {
            kept.push(network);
        }
    }
    kept
}

fn has_table(family: &str) -> Result<bool, HostNetError> {
    match run(
        &format!("list table {family} clone\n"),
        "look for its tables",
    ) {
        Ok(()) => Ok(true),
        Err(HostNetError::Nft { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Runs a script, which nft does as one transaction.
fn run(script: &str, action: &'static str) -> Result<(), HostNetError> {
    let failed = |stderr: String| HostNetError::Nft { action, stderr };
    let mut child = spawn().map_err(|error| match error.kind() {
        ErrorKind::NotFound => HostNetError::NftMissing,
        _ => failed(format!("it does not start: {error}")),
    })?;
    if let Some(mut stdin) = child.stdin.take()
        && let Err(error) = stdin.write_all(script.as_bytes())
        // It ends early where it finds a mistake, and says so itself.
        && error.kind() != ErrorKind::BrokenPipe
    {
        return Err(failed(format!("it takes no script: {error}")));
    }
    let output = child
        .wait_with_output()
        .map_err(|error| failed(format!("it does not end: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    if stderr.contains("Operation not permitted") {
        return Err(HostNetError::NotAllowed {
            action: "setting up the packet filter's",
            object: "table clone".to_owned(),
        });
    }
    Err(failed(stderr.trim().to_owned()))
}

fn spawn() -> io::Result<std::process::Child> {
    let mut last = io::Error::from(ErrorKind::NotFound);
    // The usual place is not in every user's PATH.
    for program in ["nft", "/usr/sbin/nft", "/sbin/nft"] {
        let spawned = Command::new(program)
            .args(["-f", "-"])
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        match spawned {
            Err(error) if error.kind() == ErrorKind::NotFound => last = error,
            result => return result,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks(words: &[&str]) -> Vec<Ipv4Network> {
        words.iter().map(|word| word.parse().unwrap()).collect()
    }

    #[test]
    fn a_network_within_another_is_no_element_of_its_own() {
        let given = networks(&[
            "10.1.2.3",
            "192.168.0.0/24",
            "10.0.0.0/8",
            "10.0.0.0/9",
            "192.168.0.0/24",
            "192.168.1.0/24",
        ]);
        let kept = networks(&["10.0.0.0/8", "192.168.0.0/24", "192.168.1.0/24"]);
        assert_eq!(disjoint(&given), kept);
    }

    #[test]
    fn who_may_send_everywhere_has_no_element_and_who_may_nowhere_is_held() {
        let script = |egress: &Egress| {
            let mut script = String::new();
            push_egress(&mut script, "add", "clone-0002", egress);
            script
        };
        assert_eq!(script(&Egress::Full), "");
        let held = "add element bridge clone held { \"clone-0002\" }\n";
        assert_eq!(script(&Egress::None), held);
        let allowed = script(&Egress::Allow(networks(&["10.0.0.0/8"])));
        let element = "add element bridge clone allowed { \"clone-0002\" . 10.0.0.0/8 }\n";
        assert_eq!(allowed, format!("{held}{element}"));
    }
}
