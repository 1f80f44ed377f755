//! The Debian package, in a Debian that has never seen us: a guest with systemd.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const VM: &str = "fresh";

struct Guest {
    dir: tempfile::TempDir,
}

impl Guest {
    fn boot() -> Self {
        let guest = Self {
            // Not under the shared target folder, which holds no sockets.
            dir: tempfile::tempdir_in("/run").unwrap(),
        };
        let assets = path_in("CLONE_TEST_ASSETS");
        let file = |name: &str| assets.join(name).to_str().unwrap().to_owned();
        let kernel = file("guest-kernel/vmlinux");
        let initrd = file("guest-initramfs/initramfs.cpio");
        let disk = format!("{},overlay=ephemeral", file("guest-debian/debian.ext4"));
        guest.clone(&[
            "run", "-d", "-n", VM, "-m", "768M", "-k", &kernel, "-i", &initrd, "--disk", &disk,
        ]);
        guest.clone(&["exec", "--wait", "600", VM, "true"]);
        guest
    }

    fn clone(&self, words: &[&str]) -> Output {
        let army = Path::new(env!("CARGO_BIN_EXE_army"));
        let output = Command::new(army.with_file_name("clone"))
            .args(words)
            .env("CLONE_RUNTIME_DIR", self.dir.path())
            .env_remove("LD_LIBRARY_PATH")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
        output
    }

    /// What a script prints in the guest.
    fn run(&self, script: &str) -> String {
        let output = self.clone(&["exec", VM, "--", "sh", "-ec", script]);
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let file = self.dir.path().join("vms").join(VM).join("pid");
        if let Ok(text) = std::fs::read_to_string(file)
            && let Some(pid) = text.split_whitespace().next()
        {
            let _ = Command::new("kill").args(["-9", pid]).status();
        }
    }
}

fn path_in(variable: &str) -> PathBuf {
    std::env::var_os(variable)
        .unwrap_or_else(|| panic!("{variable} is not set: run `cargo xtask test --guest`"))
        .into()
}

#[test]
fn a_package_installs_serves_and_leaves() {
    let guest = Guest::boot();
    let package = path_in("CLONE_TEST_PACKAGE");
    let target = format!("{VM}:/root/clone-army.deb");
    guest.clone(&["cp", package.to_str().unwrap(), &target]);
    guest.run("dpkg --install /root/clone-army.deb >&2");
    for program in ["clone", "army"] {
        let version = guest.run(&format!("{program} --version"));
        assert_eq!(version, format!("{program} {}", env!("CARGO_PKG_VERSION")));
    }
    guest.run("test -x /usr/lib/clone/clone-vm");
    // Nothing starts that nobody enabled.
    let state = guest.run("systemctl is-enabled army-dev army-controller army-node || true");
    assert_eq!(state, "disabled\ndisabled\ndisabled");
    assert_eq!(
        guest.run("systemctl is-active army-dev || true"),
        "inactive"
    );
    // What a manual and a shell find.
    guest.run("test -s /usr/share/man/man1/army-vm-create.1");
    guest.run("test -s /usr/share/man/man1/clone-fork.1");
    guest.run("bash -n /usr/share/bash-completion/completions/army");
    guest.run("systemd-analyze --man=no verify /usr/lib/systemd/system/army-*.service >&2");

    guest.run("systemctl enable --now army-dev 2>&1");
    let wait = "until journalctl -u army-dev -o cat | grep -q 'Army answers'; do sleep 0.5; done";
    guest.run(&format!("timeout 60 sh -c \"{wait}\""));
    let ask =
        "import urllib.request as r; print(r.urlopen('http://127.0.0.1:7777/healthz').read())";
    guest.run(&format!("cat > /root/health.py <<END\n{ask}\nEND"));
    let health = "python3 /root/health.py";
    assert!(guest.run(health).contains(env!("CARGO_PKG_VERSION")));
    // The key that the first start printed opens the API, also after a restart.
    let key = "key=$(journalctl -u army-dev -o cat | grep -o 'ARMY_KEY=.*' | head -n 1)";
    let hosts = format!("{key}; env \"$key\" army host ls");
    assert!(guest.run(&hosts).contains("ready"));
    guest.run("systemctl restart army-dev");
    guest.run(&format!(
        "timeout 60 sh -c 'until {health} >/dev/null 2>&1; do sleep 0.5; done'"
    ));
    assert!(guest.run(&hosts).contains("ready"));

    guest.run("systemctl disable --now army-dev 2>&1");
    guest.run("dpkg --purge clone-army >&2");
    assert_eq!(
        guest.run("ls /usr/bin/clone /usr/bin/army 2>/dev/null || true"),
        ""
    );
}
