use std::collections::BTreeMap;
use std::fs;

use super::*;

/// A relocatable ELF of a `.modinfo` section and the table of names.
fn module(depends: &str) -> Vec<u8> {
    let info = format!("license=GPL\0depends={depends}\0name=x\0");
    let names = b"\0.modinfo\0.shstrtab\0";
    let (info_at, names_at) = (64, 64 + info.len());
    let table = (names_at + names.len()).next_multiple_of(8);
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend_from_slice(&[1, 0, 62, 0, 1, 0, 0, 0]);
    elf.extend_from_slice(&[0; 16]);
    elf.extend_from_slice(&(table as u64).to_le_bytes());
    elf.extend_from_slice(&[0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 64, 0, 3, 0, 2, 0]);
    elf.extend_from_slice(info.as_bytes());
    elf.extend_from_slice(names);
    elf.resize(table + 64, 0);
    for (name, at, len) in [(1u32, info_at, info.len()), (10, names_at, names.len())] {
        elf.extend_from_slice(&name.to_le_bytes());
        elf.extend_from_slice(&[0; 20]);
        elf.extend_from_slice(&(at as u64).to_le_bytes());
        elf.extend_from_slice(&(len as u64).to_le_bytes());
        elf.extend_from_slice(&[0; 24]);
    }
    elf
}

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let drivers = dir.path().join("modules/kernel/drivers");
        fs::create_dir_all(&drivers).unwrap();
        fs::write(
            drivers.join("virtio_blk.ko"),
            module("virtio_ring,virtio-core"),
        )
        .unwrap();
        fs::write(drivers.join("virtio_ring.ko"), module("virtio-core")).unwrap();
        let packed = ruzstd::encoding::compress_to_vec(
            &module("")[..],
            ruzstd::encoding::CompressionLevel::Fastest,
        );
        fs::write(drivers.join("virtio-core.ko.zst"), packed).unwrap();
        fs::write(drivers.join("circle.ko"), module("circle")).unwrap();
        fs::write(drivers.join("orphan.ko"), module("absent")).unwrap();
        fs::write(
            dir.path().join("modules/modules.builtin"),
            "kernel/fs/ext4/ext4.ko\n",
        )
        .unwrap();
        fs::write(dir.path().join("busybox"), "busybox").unwrap();
        fs::write(
            dir.path().join("agent"),
            crate::kernel::testing::vmlinux(b"agent", false),
        )
        .unwrap();
        Self { dir }
    }

    fn spec(&self, init: InitramfsInit) -> InitramfsSpec {
        let mut spec = InitramfsSpec::new(self.dir.path().join("out.cpio"), init);
        spec.busybox = Some(self.dir.path().join("busybox"));
        spec.agent = Some(self.dir.path().join("agent"));
        spec.modules_dir = Some(self.dir.path().join("modules"));
        spec
    }
}

/// Reads an archive: name → mode, and data.
fn members(bytes: &[u8]) -> BTreeMap<String, (u32, Vec<u8>)> {
    let mut out = BTreeMap::new();
    let mut at = 0;
    loop {
        assert_eq!(&bytes[at..at + 6], b"070701");
        let field = |n: usize| {
            let from = at + 6 + 8 * n;
            u32::from_str_radix(std::str::from_utf8(&bytes[from..from + 8]).unwrap(), 16).unwrap()
        };
        let (mode, size, name_len) = (field(1), field(6) as usize, field(11) as usize);
        let name = String::from_utf8(bytes[at + 110..at + 110 + name_len - 1].to_vec()).unwrap();
        let data_at = (at + 110 + name_len).next_multiple_of(4);
        if name == "TRAILER!!!" {
            assert_eq!(bytes.len() % 512, 0);
            return out;
        }
        out.insert(name, (mode, bytes[data_at..data_at + size].to_vec()));
        at = (data_at + size).next_multiple_of(4);
    }
}

#[test]
fn modules_are_unpacked_in_the_order_they_need_each_other() {
    let bench = Bench::new();
    let report = build_initramfs(&bench.spec(InitramfsInit::SwitchRoot)).unwrap();
    assert_eq!(report.modules, ["virtio_core", "virtio_ring", "virtio_blk"]);
    let bytes = fs::read(&report.path).unwrap();
    assert_eq!(bytes.len() as u64, report.bytes);
    let members = members(&bytes);
    assert_eq!(
        members["lib/modules/order"].1,
        b"virtio_core\nvirtio_ring\nvirtio_blk\n"
    );
    assert_eq!(members["lib/modules/virtio_core.ko"].1, module(""));
    assert_eq!(members["bin/busybox"], (0o100_755, b"busybox".to_vec()));
    assert_eq!(members["bin/sh"], (0o120_777, b"busybox".to_vec()));
    assert_eq!(members["dev/console"].0, 0o020_600);
    assert_eq!(members["init"].0, 0o100_755);
    let script = String::from_utf8(members["init"].1.clone()).unwrap();
    assert!(
        script.contains("insmod") && script.contains("switch_root"),
        "{script}"
    );
}

#[test]
fn the_agent_alone_needs_no_busybox() {
    let bench = Bench::new();
    let mut spec = bench.spec(InitramfsInit::Agent);
    spec.busybox = None;
    spec.modules_dir = None;
    let members = members(&fs::read(build_initramfs(&spec).unwrap().path).unwrap());
    assert_eq!(
        members["init"],
        (0o120_777, b"/usr/local/bin/clone-agent".to_vec())
    );
    assert_eq!(members["usr/local/bin/clone-agent"].0, 0o100_755);
}

#[test]
fn the_scripts_are_valid_shell() {
    let bench = Bench::new();
    for init in [InitramfsInit::Agent, InitramfsInit::SwitchRoot] {
        let mut spec = bench.spec(init);
        spec.replace = true;
        let members = members(&fs::read(build_initramfs(&spec).unwrap().path).unwrap());
        let script = bench.dir.path().join("init");
        fs::write(&script, &members["init"].1).unwrap();
        assert!(
            std::process::Command::new("sh")
                .arg("-n")
                .arg(&script)
                .status()
                .unwrap()
                .success()
        );
    }
}

#[test]
fn what_is_missing_is_named() {
    let bench = Bench::new();
    let error = |change: &dyn Fn(&mut InitramfsSpec)| {
        let mut spec = bench.spec(InitramfsInit::Agent);
        change(&mut spec);
        let error = build_initramfs(&spec).unwrap_err().to_string();
        assert!(!spec.output.exists());
        error
    };
    assert!(error(&|s| s.required_modules = vec!["nope".to_owned()]).contains("no module nope"));
    assert!(
        error(&|s| s.required_modules = vec!["orphan".to_owned()]).contains("needed by orphan")
    );
    assert!(error(&|s| s.required_modules = vec!["circle".to_owned()]).contains("needs itself"));
    assert!(error(&|s| s.busybox = None).contains("busybox-static"));
    assert!(error(&|s| s.agent = None).contains("an agent"));
    // What is built in is not asked for.
    let mut spec = bench.spec(InitramfsInit::Agent);
    spec.required_modules = vec!["ext4".to_owned()];
    build_initramfs(&spec).unwrap();
}
