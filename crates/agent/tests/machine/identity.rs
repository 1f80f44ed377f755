//! Identities: each step of taking one on stands alone.

use agent_proto::messages::{ErrorCode, Identity, Interface};

use crate::{Machine, refusal};

const OLD_ID: &str = "0123456789abcdef0123456789abcdef";
const NEW_ID: &str = "fedcba9876543210fedcba9876543210";
/// A guest as a template has it.
const TEMPLATE: &str = "echo 0123456789abcdef0123456789abcdef > etc/machine-id
    printf '127.0.0.1 localhost\\n127.0.1.1 base\\n' > etc/hosts
    echo 'nameserver 192.0.2.1' > etc/resolv.conf
    mkdir etc/ssh && ssh-keygen -q -t ed25519 -N '' -f etc/ssh/ssh_host_ed25519_key
    cp etc/ssh/ssh_host_ed25519_key.pub old.pub";

fn template(more: &str) -> Machine {
    Machine::boot_with(&format!("{TEMPLATE}\n{more}"))
}

fn identity() -> Identity {
    Identity {
        hostname: "c1".to_owned(),
        machine_id: NEW_ID.to_owned(),
        seed: vec![7; 32],
        dns: vec!["192.0.2.53".to_owned()],
        new_ssh_host_keys: true,
        ..Identity::default()
    }
}

/// Gives `machine` its identity, and returns the notices.
fn identify(machine: &Machine) -> Vec<String> {
    machine.connect().set_identity(identity()).unwrap()
}

fn assert_is_itself(machine: &Machine) {
    assert_eq!(machine.run("uname -n; cat /etc/hostname"), "c1\nc1\n");
    assert_eq!(machine.read("/etc/machine-id"), format!("{NEW_ID}\n"));
    assert_eq!(machine.read("/etc/resolv.conf"), "nameserver 192.0.2.53\n");
    assert_eq!(machine.run("getent hosts c1"), "127.0.1.1       c1\n");
    let key = machine.read("/etc/ssh/ssh_host_ed25519_key.pub");
    assert!(key.starts_with("ssh-ed25519 "), "{key}");
    assert_ne!(key, machine.read("/old.pub"));
    let matches = "ssh-keygen -y -f /etc/ssh/ssh_host_ed25519_key | cut -d ' ' -f 2 |
                   grep -qF -f - /etc/ssh/ssh_host_ed25519_key.pub";
    machine.run(matches);
}

#[test]
fn a_guest_takes_all_of_an_identity_on() {
    let machine = template(
        "mkdir -p var/lib/dbus var/lib/systemd
        cp etc/machine-id var/lib/dbus/machine-id; echo seed > var/lib/systemd/random-seed",
    );
    assert_eq!(identify(&machine), [""; 0]);
    assert_is_itself(&machine);
    assert_eq!(
        machine.read("/var/lib/dbus/machine-id"),
        format!("{NEW_ID}\n")
    );
    assert_eq!(
        machine.run("stat -c %s /var/lib/systemd/random-seed"),
        "512\n"
    );
    assert_eq!(
        machine.run("ls -A /etc /etc/ssh | grep '^\\.' || echo clean"),
        "clean\n"
    );
}

#[test]
fn a_link_that_leads_nowhere_is_no_hindrance() {
    let machine = template("ln -sf ../run/systemd/resolve/stub-resolv.conf etc/resolv.conf");
    assert_eq!(identify(&machine), [""; 0]);
    assert_is_itself(&machine);
}

#[test]
fn a_full_disk_leaves_files_whole_and_the_guest_is_itself() {
    let machine = template("");
    // Not a byte is left.
    machine
        .run("cat /dev/zero > /fill 2>/dev/null; sync; echo x > /try 2>/dev/null; [ ! -s /try ]");
    let notices = identify(&machine);
    assert_is_itself(&machine);
    assert_eq!(notices.len(), 1, "{notices:?}");
    assert!(notices[0].contains("/etc/machine-id"), "{notices:?}");
    assert!(notices[0].contains("No space left"), "{notices:?}");
    // What is on the disk is the old, whole.
    machine.run("mkdir /run/disk && mount --bind / /run/disk");
    assert_eq!(
        machine.run("cat /run/disk/etc/machine-id"),
        format!("{OLD_ID}\n")
    );
    assert_eq!(machine.run("cat /run/disk/etc/hostname"), "base\n");
}

#[test]
fn a_read_only_root_is_no_hindrance_again_and_again() {
    let machine = template("mount -o remount,ro .");
    for _ in 0..3 {
        let notices = identify(&machine);
        assert_is_itself(&machine);
        assert_eq!(notices.len(), 1, "{notices:?}");
        assert!(notices[0].contains("Read-only file system"), "{notices:?}");
    }
    // A clone's clone does not stack its files on its ancestors'.
    assert_eq!(
        machine.run("grep -c ' /etc/machine-id ' /proc/mounts"),
        "1\n"
    );
}

#[test]
fn a_key_of_a_kind_that_is_no_longer_made_is_taken_away() {
    let machine = template(
        "for kind in gone rsa; do (umask 77; echo old > etc/ssh/ssh_host_${kind}_key); done
         echo 'ssh-gone AAAA' > etc/ssh/ssh_host_gone_key.pub",
    );
    let notices = identify(&machine);
    assert_is_itself(&machine);
    assert_eq!(notices.len(), 1, "{notices:?}");
    assert!(
        notices[0].contains("ssh_host_gone_key was taken away"),
        "{notices:?}"
    );
    let keys = machine.run("cd /etc/ssh; ls");
    let expected = "ssh_host_ed25519_key\nssh_host_ed25519_key.pub\n\
                    ssh_host_rsa_key\nssh_host_rsa_key.pub\n";
    assert_eq!(keys, expected);
    assert_eq!(
        machine.run("stat -c %a /etc/ssh/ssh_host_rsa_key /run/clone"),
        "600\n755\n"
    );
}

#[test]
fn an_old_key_that_cannot_be_removed_cannot_be_read_either() {
    let machine = template("echo old > etc/ssh/ssh_host_gone_key; mount -o remount,ro .");
    let notices = identify(&machine);
    assert_is_itself(&machine);
    assert!(
        notices[0].contains("ssh_host_gone_key was taken away"),
        "{notices:?}"
    );
    assert_eq!(machine.read("/etc/ssh/ssh_host_gone_key"), "");
}

/// Files in memory cannot stand in for others here.
const NO_COVERS: &str = "touch run/clone";

#[test]
fn two_guests_never_share_a_machine_id_or_a_key() {
    let machine = template(&format!("{NO_COVERS}; mount -o remount,ro ."));
    let (code, message) = refusal(machine.connect().set_identity(identity()));
    assert_eq!(code, ErrorCode::Denied);
    assert!(
        message.contains("two guests would have one machine id"),
        "{message}"
    );
    let keys_only = Identity {
        new_ssh_host_keys: true,
        ..Identity::default()
    };
    let (_, message) = refusal(machine.connect().set_identity(keys_only));
    assert!(
        message.contains("two guests would have one SSH host key"),
        "{message}"
    );
}

#[test]
fn what_is_neither_secret_nor_address_never_ends_a_fork() {
    let machine = Machine::boot_with(&format!(
        "{NO_COVERS}; mkdir -p etc/clone/identity.d; mount -o remount,ro ."
    ));
    let notices = identify(&machine);
    assert_eq!(machine.run("uname -n"), "c1\n");
    for file in [
        "/etc/machine-id",
        "/etc/hostname",
        "/etc/hosts",
        "/etc/resolv.conf",
    ] {
        let named = notices.iter().any(|notice| notice.contains(file));
        assert!(named, "nothing of {file} in {notices:?}");
    }
}

#[test]
fn programs_of_a_new_identity_run_for_a_clone_and_not_when_only_the_clock_is_set() {
    let machine = Machine::boot();
    machine.run(
        "mkdir -p /etc/clone/identity.d; \
         printf '#!/bin/sh\\necho ran >> /run/ran\\n' > /etc/clone/identity.d/10; \
         chmod +x /etc/clone/identity.d/10",
    );
    // Namespaces share the host's clock, so it stays as it is.
    machine.connect().set_identity(Identity::default()).unwrap();
    assert_eq!(machine.run("cat /run/ran 2>/dev/null; true"), "");
    identify(&machine);
    assert_eq!(machine.run("cat /run/ran"), "ran\n");
}

fn network(interface: Interface) -> Identity {
    Identity {
        interfaces: vec![interface],
        ..Identity::default()
    }
}

#[test]
fn an_interface_gets_its_addresses_and_one_that_is_missing_is_reported() {
    let machine = Machine::boot();
    machine.run("ip link add eth7 type veth peer name eth8 && ip addr add 10.0.0.2/24 dev eth7");
    let interface = Interface {
        name: "eth7".to_owned(),
        mac: "02:00:00:00:00:07".to_owned(),
        address: "10.0.0.7/24".to_owned(),
        gateway: "10.0.0.1".to_owned(),
    };
    let set = |interface| machine.connect().set_identity(network(interface));
    assert_eq!(set(interface.clone()).unwrap(), [""; 0]);
    let shown = machine.run("ip addr show eth7; ip route");
    for part in [
        "02:00:00:00:00:07",
        "inet 10.0.0.7/24",
        "default via 10.0.0.1",
    ] {
        assert!(shown.contains(part), "no {part} in {shown}");
    }
    assert!(!shown.contains("10.0.0.2/"), "{shown}");
    for name in ["", "nope0"] {
        let missing = Interface {
            name: name.to_owned(),
            ..interface.clone()
        };
        let notices = set(missing).unwrap();
        assert!(notices[0].contains("no Ethernet interface"), "{notices:?}");
    }
    // Without a way out it is still alone with its address.
    let stray = Interface {
        gateway: "203.0.113.1".to_owned(),
        ..interface
    };
    let notices = set(stray).unwrap();
    assert!(
        notices[0].contains("eth7: cannot set the gateway"),
        "{notices:?}"
    );
}

#[test]
fn two_guests_never_share_an_address() {
    let machine = Machine::boot();
    machine.run("ip link add eth7 type veth peer name eth8");
    // A group address is no interface's own.
    let interface = Interface {
        name: "eth7".to_owned(),
        mac: "01:00:5e:00:00:01".to_owned(),
        ..Interface::default()
    };
    let (_, message) = refusal(machine.connect().set_identity(network(interface)));
    assert!(
        message.contains("two guests would have one address"),
        "{message}"
    );
}
