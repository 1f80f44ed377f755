//! Sets up a machine whose init is the agent, beyond its image: the mounts, devices and settings
//! that a container engine gives a container, and that programs expect.
//!
//! The parts are independent. One that the kernel or the image does not allow is reported on the
//! console.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, mkfifoat};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::identity;
use crate::report::Report;

/// The mounts, with the types and options that a distribution's init would use.
const MOUNTS: [(&str, &str, &str); 6] = [
    ("proc", "/proc", ""),
    ("sysfs", "/sys", ""),
    ("devtmpfs", "/dev", "mode=0755"),
    ("devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=666"),
    ("tmpfs", "/dev/shm", "mode=1777"),
    ("cgroup2", "/sys/fs/cgroup", ""),
];
/// Directories in memory that begin with what the image has in them.
const VOLATILE: [(&str, &str); 2] = [("/run", "mode=0755"), ("/tmp", "mode=1777")];
/// The most bytes that are copied into memory; a larger directory stays on the image's disk.
const VOLATILE_MAX: u64 = 16 << 20;
/// proc_pid_fd(5).
const LINKS: [(&str, &str); 4] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
];
/// Settings that container engines make: any user may listen on any port, and use `ping`.
const SYSCTLS: [(&str, &str); 2] = [
    ("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"),
    ("/proc/sys/net/ipv4/ping_group_range", "0 2147483647"),
];
/// As systemd has it: select(2) can take no more than the first, servers raise it to the second.
const OPEN_FILES: (u64, u64) = (1024, 524_288);
const HOSTNAME: &str = "/etc/hostname";
/// The name of a machine that was given none (hostname(7)).
const NO_NAME: &str = "localhost";

pub(crate) fn furnish() {
    for (kind, path, options) in MOUNTS {
        let _ = fs::create_dir_all(path);
        report(path, mount_one(kind, path, options));
    }
    for (path, options) in VOLATILE {
        let _ = fs::create_dir_all(path);
        report(path, mount_volatile(Path::new(path), options));
    }
    for (link, target) in LINKS {
        match symlink(target, link) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => report(link, made),
        }
    }
    for (path, value) in SYSCTLS {
        match fs::write(path, value) {
            // A kernel without this part of the network.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            written => report(path, written),
        }
    }
    report("the limit of open files", limit_open_files());
    set_hostname();
}

fn limit_open_files() -> io::Result<()> {
    let (current, maximum) = OPEN_FILES;
    let set = |maximum| {
        let limit = Rlimit {
            current: Some(current),
            maximum,
        };
        setrlimit(Resource::Nofile, limit)
    };
    // A kernel that is set to less than the usual, or rights that were taken, keep the maximum low.
    set(Some(maximum))
        .or_else(|_| set(getrlimit(Resource::Nofile).maximum))
        .map_err(io::Error::from)
}

fn report(what: &str, result: io::Result<()>) {
    if let Err(error) = result {
        crate::say(&format!("cannot set up {what}: {error}"));
    }
}

fn mount_one(kind: &str, path: &str, options: &str) -> io::Result<()> {
    let options = CString::new(options)?;
    match mount(kind, path, kind, MountFlags::NOSUID, options.as_c_str()) {
        // The kernel or an earlier stage has mounted it.
        Ok(()) | Err(rustix::io::Errno::BUSY) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Puts a file system in memory over a directory, with all that was in it. A directory with more
/// than memory is to be used for stays as it is.
fn mount_volatile(path: &Path, options: &str) -> io::Result<()> {
    // The image's directory is held open, so that it can be reached below the file system that is
    // mounted over it.
    let image = File::open(path)?;
    let image = PathBuf::from(format!("/proc/self/fd/{}", image.as_raw_fd())).join(".");
    if size_of(&image)? > VOLATILE_MAX {
        return Ok(());
    }
    let options = CString::new(options)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount("tmpfs", path, "tmpfs", flags, options.as_c_str())?;
    copy_entries(&image, path).inspect_err(|_| {
        // After a failed copy, the image's directory is used rather than a part of it.
        let _ = unmount(path, UnmountFlags::DETACH);
    })
}

/// The bytes of all files below a directory, and a page for each entry.
fn size_of(folder: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let about = entry.metadata()?;
        bytes += match about.is_dir() {
            true => size_of(&entry.path())?,
            false => about.len(),
        } + 4096;
        if bytes > VOLATILE_MAX {
            break;
        }
    }
    Ok(bytes)
}

/// Copies what is in one directory into another: files, directories, links and pipes, with owners
/// and permissions. Sockets and devices are their makers' to make again.
fn copy_entries(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (old, new) = (entry.path(), to.join(entry.file_name()));
        let about = entry.metadata()?;
        let kind = about.file_type();
        if kind.is_symlink() {
            symlink(fs::read_link(&old)?, &new)?;
        } else if kind.is_dir() {
            fs::DirBuilder::new().mode(0o700).create(&new)?;
            copy_entries(&old, &new)?;
        } else if kind.is_file() {
            fs::copy(&old, &new)?;
        } else if is_pipe(&about) {
            mkfifoat(rustix::fs::CWD, &new, Mode::RUSR | Mode::WUSR)?;
        } else {
            continue;
        }
        lchown(&new, Some(about.uid()), Some(about.gid()))?;
        if !kind.is_symlink() {
            fs::set_permissions(&new, fs::Permissions::from_mode(about.mode() & 0o7777))?;
        }
    }
    Ok(())
}

fn is_pipe(about: &fs::Metadata) -> bool {
    about.mode() & libc::S_IFMT == libc::S_IFIFO
}

/// The name that the image gives the machine; `/etc/hosts` gets to know it.
fn set_hostname() {
    let former = rustix::system::uname();
    let former = former.nodename().to_string_lossy().into_owned();
    let Some(name) = wanted_name(&fs::read_to_string(HOSTNAME).unwrap_or_default(), &former) else {
        return;
    };
    let set = rustix::system::sethostname(name.as_bytes());
    report("the host name", set.map_err(io::Error::from));
    let mut notices = Report::default();
    identity::resolve_own_name(&former, &name, &mut notices);
    for notice in notices.into_notices() {
        crate::say(&notice);
    }
}

/// The name that a file like `/etc/hostname` gives; else one for a machine that has none.
fn wanted_name(text: &str, present: &str) -> Option<String> {
    let mut lines = text.lines().map(str::trim);
    let named = lines.find(|line| !line.is_empty() && !line.starts_with('#'));
    match named.filter(|name| identity::is_hostname(name)) {
        Some(name) => Some(name.to_owned()),
        None => (present.is_empty() || present == "(none)").then(|| NO_NAME.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_has_the_name_of_its_image_or_one_at_least() {
        let wanted = |text, present| wanted_name(text, present);
        assert_eq!(wanted("# ours\n\n web-1 \n", "(none)").unwrap(), "web-1");
        assert_eq!(wanted("", "(none)").unwrap(), NO_NAME);
        assert_eq!(wanted("no name\n", "given"), None);
    }

    #[test]
    fn what_a_directory_has_is_copied_with_its_owners_and_modes() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for folder in ["from/deep/er", "to"] {
            fs::create_dir_all(path(folder)).unwrap();
        }
        fs::set_permissions(path("from/deep"), fs::Permissions::from_mode(0o1777)).unwrap();
        fs::write(path("from/deep/er/file"), "text").unwrap();
        symlink("deep/er/file", path("from/link")).unwrap();
        mkfifoat(rustix::fs::CWD, path("from/pipe"), Mode::RUSR).unwrap();
        copy_entries(&path("from"), &path("to")).unwrap();
        assert_eq!(fs::read_to_string(path("to/link")).unwrap(), "text");
        let mode = |name: &str| fs::symlink_metadata(path(name)).unwrap().mode();
        assert_eq!(mode("to/deep"), libc::S_IFDIR | 0o1777);
        assert_eq!(mode("to/pipe"), libc::S_IFIFO | 0o400);
        assert_eq!(size_of(&path("to")).unwrap(), 5 * 4096 + 4 + 12);
    }
}
