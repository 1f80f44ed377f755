//! Every command that the README and the book show, run as they say, with what it prints compared.
//! `book/mod.rs` tells how pages are written.
//!
//! All pages are run where nothing of this machine is touched and nothing stays: by root, with
//! mounts, networks and processes of their own, which the kernel ends with the test.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod book;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use book::{How, Page, compare, pages, root};

/// How long all pages may take.
const PATIENCE: Duration = Duration::from_secs(900);
/// What is run in namespaces of its own: pages, one after the other, until one fails.
const DRIVER: &str = r#"
# Everything of a host that the pages change, but not this machine's.
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=755 tmpfs /var/lib
ip link set lo up
unset LD_LIBRARY_PATH ARMY_URL ARMY_KEY ARMY_STATE CLONE_RUNTIME_DIR CLONE_TEMPLATE_DIR
cd "$1/work"
for page in "$1"/pages/*; do
    SECONDS=0
    __dir=$1 __out=$page BASH_ENV=$1/prelude bash "$page/script" </dev/null || exit 1
    # The README goes on with the first page's VM; all others find an empty host.
    [ "$page" = "$1/pages/00" ] || for vm in $(clone ls --quiet); do clone kill "$vm"; done >/dev/null
    echo "$SECONDS" > "$page/seconds"
done
"#;
/// What every page's shell knows. The script itself sets the traps: where a sourced file does, they
/// end with it.
const PRELUDE: &str = r#"
unset BASH_ENV
export -n __dir __out
set -o pipefail
export ARMY_URL=http://127.0.0.1:7777 ARMY_KEY=
[ ! -e "$__dir/key" ] || ARMY_KEY=$(cat "$__dir/key")

__alone() {
    __stop
    rm -rf /var/lib/army
}
__failed() {
    trap - ERR DEBUG
    echo "$2: ended with $1: $3" > "$__out/failed"
    exit 1
}
__begin() {
    __block=$1
    exec 3>&1 4>&2 >"$__out/$1.out" 2>&1
}
__end() {
    exec >&3 2>&4 3>&- 4>&-
    tail -n 1 "$__out/$__block.out" > "$__dir/last"
}
# Starts a server, and returns when it says that it is ready.
__serve() {
    local log=$__dir/server.log
    setsid "$@" >"$log" 2>"$__dir/server.err" </dev/null 3>&- 4>&- &
    local server=$! key
    echo "$server" > "$__dir/server.pid"
    until grep -qs -e '^Army answers at' -e '^The node of' "$log"; do
        if ! kill -0 "$server" 2>/dev/null; then
            cat "$log" "$__dir/server.err"
            return 1
        fi
        sleep 0.1
    done
    key=$(sed -n 's/.*ARMY_KEY=//p' "$log")
    [ -z "$key" ] || echo "$key" > "$__dir/key"
    cat "$log"
}
__stop() {
    local server
    server=$(cat "$__dir/server.pid")
    kill "$server"
    while kill -0 "$server" 2>/dev/null; do sleep 0.1; done
}
# There is no systemd where pages are run.
systemctl() {
    case "$*" in
        'stop army-dev') __stop ;;
        'start army-dev') __serve army dev >/dev/null ;;
        'restart army-dev') __stop && __serve army dev >/dev/null ;;
        *) echo "systemctl $*: not here" && return 1 ;;
    esac
}
"#;

#[test]
fn what_the_book_shows_can_be_done_and_prints_what_it_says() {
    let pages = pages();
    for page in &pages {
        for block in &page.blocks {
            if let How::Skip(reason) = &block.how {
                println!("not run: {}:{}: {reason}", page.path.display(), block.line);
            }
        }
    }
    // Not below /run, which the pages have one of their own of.
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    lay_out(dir.path(), &pages);
    let ended = run(dir.path());
    let mut wrong = Vec::new();
    for (index, page) in pages.iter().enumerate() {
        let out = place(dir.path(), index);
        let seconds = fs::read_to_string(out.join("seconds")).unwrap_or("-".into());
        println!("{}: {} s", page.path.display(), seconds.trim());
        wrong.extend(mistakes(page, &out));
    }
    if !ended && wrong.is_empty() {
        wrong.push("the pages were not run to their end".to_owned());
    }
    if !wrong.is_empty() {
        let log = fs::read_to_string(dir.path().join("server.err")).unwrap_or_default();
        println!("the last server's log:\n{log}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Where the script and the outputs of a page are.
fn place(dir: &Path, index: usize) -> std::path::PathBuf {
    dir.join("pages").join(format!("{index:02}"))
}

/// The scripts of the pages, and the directory in which they are run.
fn lay_out(dir: &Path, pages: &[Page]) {
    let assets = std::env::var_os("CLONE_TEST_ASSETS")
        .expect("set CLONE_TEST_ASSETS, or run `cargo xtask test --guest`");
    let work = dir.join("work");
    fs::create_dir_all(work.join("target")).unwrap();
    let link = |from: &Path, to: &str| std::os::unix::fs::symlink(from, work.join(to)).unwrap();
    link(Path::new(&assets), "target/assets");
    link(&root().join("examples").canonicalize().unwrap(), "examples");
    fs::write(dir.join("prelude"), PRELUDE).unwrap();
    for (index, page) in pages.iter().enumerate() {
        let out = place(dir, index);
        fs::create_dir_all(&out).unwrap();
        fs::write(out.join("script"), page.script()).unwrap();
    }
}

/// Runs all pages; whether all went to their end.
fn run(dir: &Path) -> bool {
    let programs = Path::new(env!("CARGO_BIN_EXE_army")).parent().unwrap();
    let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", programs.display());
    let child = Command::new("unshare")
        .args([
            "--mount",
            "--net",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ])
        .args(["bash", "-c", &format!("set -e\n{DRIVER}"), "bash"])
        .arg(dir)
        .env("PATH", path)
        .stdin(Stdio::null())
        .spawn();
    let mut child = Pages(child.unwrap());
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.0.try_wait().unwrap() {
            return status.success();
        }
        if Instant::now() > end {
            println!("all pages together may take {PATIENCE:?}, and took longer");
            return false;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// The process of the pages, with which all that they started ends.
struct Pages(Child);

impl Drop for Pages {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

/// What went wrong on a page, each with its line.
fn mistakes(page: &Page, out: &Path) -> Vec<String> {
    let path = page.path.display();
    let read = |name: &str| fs::read_to_string(out.join(name)).ok();
    let mut wrong = Vec::new();
    let finished = read("seconds").is_some();
    for block in page.blocks.iter().filter(|block| !block.is_skipped()) {
        let Some(got) = read(&format!("{}.out", block.line)) else {
            break;
        };
        let is_last = !out
            .join(format!("{}.out", next_line(page, block.line)))
            .exists();
        if !finished && is_last {
            // This is where it stopped.
            let reached = read("failed").unwrap_or_else(|| {
                let line = read("line").unwrap_or_default();
                format!("{}: it went no further", line.trim())
            });
            wrong.push(format!("{path}:{}\n{got}", reached.trim()));
            break;
        }
        if let Some((line, expected)) = &block.expected
            && let Err(why) = compare(expected, &got)
        {
            wrong.push(format!("{path}:{line}: {why}; printed was\n{got}"));
        }
    }
    wrong
}

/// The line of the block that is run after that of `line`; 0 where there is none.
fn next_line(page: &Page, line: usize) -> usize {
    let mut after = page
        .blocks
        .iter()
        .filter(|it| !it.is_skipped() && it.line > line);
    after.next().map_or(0, |block| block.line)
}
