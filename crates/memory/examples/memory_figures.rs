//! Measures what this crate's operations cost on this host, with no guest: `cargo run --release
//! --example memory_figures -p clone-memory [DIRECTORY]`. Layers are written to the directory, or
//! to memory files if there is none.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clone_memory::layout::PAGE_SIZE;
use clone_memory::{
    ChangeTracker, Checksums, GuestMemory, Layer, LayerId, LayerStack, LayerWriter, PageSet,
    Pagemap, ProcessUsage, RamLayout,
};
use rustix::fs::MemfdFlags;
use vm_memory::Bytes;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const RAM: u64 = 512 << 20;
const PAGES: u64 = RAM / PAGE_SIZE;

/// Prints the least and the median time of some runs.
fn measure<T>(name: &str, runs: usize, mut run: impl FnMut() -> Result<T>) -> Result<T> {
    let mut times = Vec::new();
    let mut last = None;
    for _ in 0..runs.max(1) {
        let start = Instant::now();
        last = Some(run()?);
        times.push(start.elapsed());
    }
    times.sort();
    let (least, median): (Duration, Duration) = (times[0], times[times.len() / 2]);
    writeln!(
        std::io::stdout(),
        "{name:<62} {least:>12.1?} {median:>12.1?}"
    )?;
    last.ok_or_else(|| "nothing was run".into())
}

fn new_file(directory: Option<&PathBuf>, name: &str) -> Result<File> {
    Ok(match directory {
        None => rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?.into(),
        Some(directory) => File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(directory.join(name))?,
    })
}

/// Writes one word to each page.
fn touch(memory: &GuestMemory, pages: impl Iterator<Item = u64>) -> Result<()> {
    for page in pages {
        let address = memory
            .layout()
            .address_of(page * PAGE_SIZE)
            .ok_or("beyond RAM")?;
        memory.ram().write_obj(page | 1 << 60, address)?;
    }
    Ok(())
}

fn write_layer(
    memory: &GuestMemory,
    file: File,
    parent: Option<LayerId>,
    pages: &PageSet,
    checksums: Checksums,
) -> Result<Layer> {
    let mut writer = LayerWriter::new(file, "figures", *memory.layout(), parent)?;
    writer.copy(memory, pages)?;
    Ok(writer.finish(checksums)?)
}

fn main() -> Result<()> {
    let directory = std::env::args_os().nth(1).map(PathBuf::from);
    let directory = directory.as_ref();
    let layout = RamLayout::new(RAM).ok_or("odd RAM")?;
    let pagemap = Pagemap::open()?;
    writeln!(
        std::io::stdout(),
        "{:<62} {:>12} {:>12}",
        "512 MiB of RAM",
        "least",
        "median"
    )?;

    // A guest with 200 MiB of data in runs of 512 pages, and single pages here and there.
    let parent = GuestMemory::anonymous(&layout)?;
    touch(
        &parent,
        (0..PAGES).filter(|page| page % 1024 < 400 || page % 256 == 200),
    )?;
    let own = measure("find private pages of the parent (200 MiB)", 5, || {
        Ok(parent.private_pages(&pagemap)?)
    })?;
    measure("write it as a base, no checksums", 3, || {
        write_layer(
            &parent,
            new_file(directory, "base")?,
            None,
            &own,
            Checksums::Transient,
        )
    })?;
    let base = measure("write it as a base, with checksums", 3, || {
        write_layer(
            &parent,
            new_file(directory, "base")?,
            None,
            &own,
            Checksums::Yes,
        )
    })?;
    measure("sync it", 1, || Ok(base.file().sync_all()?))?;
    for threads in [1, 2] {
        measure(&format!("verify it, {threads} threads"), 3, || {
            Ok(base.verify(threads)?)
        })?;
    }
    measure("copy it to a sealed memory file", 1, || {
        Ok(base.to_memory()?)
    })?;
    drop(parent);

    let stack = LayerStack::new(vec![base.clone()])?;
    let name = format!("map it ({} pieces)", stack.pieces().len());
    measure(&name, 20, || Ok(GuestMemory::from_layers(&layout, &stack)?))?;

    let clone = GuestMemory::from_layers(&layout, &stack)?;
    measure("find private pages, nothing touched", 5, || {
        Ok(clone.private_pages(&pagemap)?)
    })?;
    measure("prefetch all of it", 1, || {
        Ok(clone.prefetch(&std::iter::once(0..PAGES).collect())?)
    })?;
    touch(&clone, (0..PAGES).step_by(131))?;
    let name = "find 1,001 private pages, all of RAM mapped";
    let changed = measure(name, 5, || Ok(clone.private_pages(&pagemap)?))?;
    measure("count by layer (usage), all of RAM mapped", 5, || {
        Ok(clone.usage(&pagemap)?)
    })?;
    let pid = std::process::id();
    measure("kernel's counters of a process (status)", 200, || {
        Ok(ProcessUsage::of(pid)?)
    })?;
    for file in ["statm", "smaps_rollup"] {
        measure(&format!("for comparison: /proc/PID/{file}"), 20, || {
            Ok(std::fs::read(format!("/proc/{pid}/{file}"))?)
        })?;
    }

    let tracker = measure("register with userfaultfd", 1, || {
        Ok(ChangeTracker::new(&clone, pagemap.try_clone()?)?)
    })?;
    measure("arm, 1,001 private pages, all of RAM mapped", 5, || {
        Ok(tracker.arm()?)
    })?;
    measure("take changed, none", 5, || Ok(tracker.take_changed()?))?;
    measure("write 100 pages and take them", 5, || {
        touch(&clone, (0..PAGES).step_by(1310))?;
        Ok(tracker.take_changed()?)
    })?;
    drop(tracker);
    let diff = measure(
        "write a diff of 1,001 single pages, no checksums",
        5,
        || {
            let file = new_file(directory, "diff")?;
            write_layer(
                &clone,
                file,
                Some(base.id()),
                &changed,
                Checksums::Transient,
            )
        },
    )?;
    let stack = LayerStack::new(vec![base, diff])?;
    let name = format!("map base and diff ({} pieces)", stack.pieces().len());
    measure(&name, 20, || Ok(GuestMemory::from_layers(&layout, &stack)?))?;
    measure("flatten base and diff to a base", 1, || {
        Ok(stack.flatten(0, new_file(directory, "flat")?, "flat")?)
    })?;
    Ok(())
}
