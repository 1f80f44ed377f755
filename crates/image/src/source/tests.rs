use std::fs;
use std::path::Path;

use proptest::prelude::*;
use tar::EntryType;

use super::cpu_level::CpuLevel;
use super::layer::LayerMerge;
use super::oci::{OciImage, Wanted};
use super::store::Store;
use super::tar_stream::TarStream;
use super::testing::*;
use crate::tree::{Kind, Limits, Node, NodeId, Spool, Tree};
use crate::{ImageError, Result};

fn merged(tars: &[Vec<u8>]) -> Result<Tree> {
    merged_within(tars, Limits::default())
}

fn merged_within(tars: &[Vec<u8>], limits: Limits) -> Result<Tree> {
    let dir = tempfile::tempdir().unwrap();
    let mut tree = Tree::new(limits);
    let mut spool = Spool::new(dir.path(), limits.content_bytes)?;
    for tar in tars {
        LayerMerge::new(&mut tree, &mut spool, "the layer").merge(&tar[..])?;
    }
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        0,
        "nothing has a name on the host"
    );
    Ok(tree)
}

fn error_of(layer: Layer) -> String {
    merged(&[layer.tar()])
        .expect_err("this layer must be refused")
        .to_string()
}

fn at<'a>(tree: &'a Tree, path: &str) -> Option<&'a Node> {
    let (dir, name) = path.rsplit_once('/').unwrap();
    let dir = if dir.is_empty() {
        NodeId::ROOT
    } else {
        tree.find(dir)?
    };
    tree.child(dir, name.as_bytes()).map(|id| tree.node(id))
}

fn text(tree: &Tree, path: &str) -> String {
    let Some(Node {
        kind: Kind::File(content),
        ..
    }) = at(tree, path)
    else {
        panic!("{path} is no file")
    };
    let mut bytes = vec![0; content.len() as usize];
    content
        .open()
        .unwrap()
        .read_exact_at(&mut bytes, 0)
        .unwrap();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn later_layers_replace_and_whiteouts_hide() {
    let lower = Layer::new()
        .dir("etc/")
        .file("etc/a", b"old")
        .file("etc/b", b"b")
        .file("etc/sub/deep", b"d");
    let upper = Layer::new()
        .file("etc/a", b"new")
        .file("etc/.wh.b", b"")
        .file("etc/.wh.sub", b"")
        .file("etc/.wh.none", b"");
    let tree = merged(&[lower.tar(), upper.tar()]).unwrap();
    assert_eq!(text(&tree, "/etc/a"), "new");
    let etc = tree.dir(tree.find("/etc").unwrap()).unwrap();
    assert_eq!(
        etc.keys()
            .map(|k| String::from_utf8_lossy(k))
            .collect::<Vec<_>>(),
        ["a"]
    );
}

#[test]
fn an_opaque_directory_hides_only_what_lies_below_wherever_the_marker_stands() {
    let lower = || {
        Layer::new()
            .dir("d")
            .file("d/low", b"1")
            .file("d/sub/low", b"2")
            .file("d/both", b"3")
    };
    for marker_first in [true, false] {
        let mut upper = Layer::new().dir("d");
        upper = upper.dir("d/early").file("d/early/x", b"8");
        if marker_first {
            upper = upper.file("d/.wh..wh..opq", b"");
        }
        upper = upper
            .file("d/new", b"4")
            .file("d/sub/new", b"5")
            .file("d/both", b"6");
        upper = upper.file("d/implied/by/new", b"7");
        if !marker_first {
            upper = upper.file("d/.wh..wh..opq", b"");
        }
        let tree = merged(&[lower().tar(), upper.tar()]).unwrap();
        assert!(at(&tree, "/d/low").is_none() && at(&tree, "/d/sub/low").is_none());
        assert_eq!(text(&tree, "/d/new"), "4");
        assert_eq!(text(&tree, "/d/implied/by/new"), "7");
        assert_eq!(text(&tree, "/d/early/x"), "8");
        assert_eq!(text(&tree, "/d/sub/new"), "5");
        assert_eq!(text(&tree, "/d/both"), "6");
    }
}

#[test]
fn a_whiteout_does_not_hide_its_own_layers_file() {
    let lower = Layer::new().file("x/old", b"").file("f", b"lower");
    let upper = Layer::new()
        .file("x/new", b"")
        .file(".wh.x", b"")
        .file("f", b"upper")
        .file(".wh.f", b"");
    let tree = merged(&[lower.tar(), upper.tar()]).unwrap();
    assert!(at(&tree, "/x/new").is_some() && at(&tree, "/x/old").is_none());
    assert_eq!(text(&tree, "/f"), "upper");
}

#[test]
fn directories_merge_and_files_replace_directories() {
    let lower = Layer::new().file("d/keep", b"k").file("t/gone", b"g");
    let upper = Layer::new()
        .entry("d", EntryType::Directory, b"", "", 0o700)
        .file("t", b"now a file");
    let tree = merged(&[lower.tar(), upper.tar()]).unwrap();
    assert_eq!(text(&tree, "/d/keep"), "k");
    assert_eq!(at(&tree, "/d").unwrap().meta.mode, 0o700);
    assert_eq!(text(&tree, "/t"), "now a file");
}

#[test]
fn a_link_of_a_lower_layer_leads_into_the_tree_only() {
    let lower = || {
        Layer::new()
            .dir("usr/lib")
            .symlink("lib", "usr/lib")
            .symlink("out", "../../../etc")
            .symlink("abs", "/usr")
    };
    let upper = Layer::new().file("lib/x.so", b"so").file("abs/y", b"y");
    let tree = merged(&[lower().tar(), upper.tar()]).unwrap();
    assert_eq!(text(&tree, "/usr/lib/x.so"), "so");
    assert_eq!(text(&tree, "/usr/y"), "y");
    let error = merged(&[lower().tar(), Layer::new().file("out/passwd", b"").tar()])
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("out/passwd") && error.contains("leads out of the image"),
        "{error}"
    );
}

#[test]
fn names_that_try_to_leave_are_refused() {
    assert!(error_of(Layer::new().file("../evil", b"")).contains("`..`"));
    assert!(error_of(Layer::new().file("a/../../evil", b"")).contains("`..`"));
    assert!(error_of(Layer::new().file("/../etc/passwd", b"")).contains("`..`"));
    assert!(error_of(Layer::new().hard_link("h", "../../etc/shadow")).contains("`..`"));
    assert!(error_of(Layer::new().hard_link("h", "missing")).contains("does not exist"));
    assert!(
        error_of(Layer::new().dir("d").hard_link("h", "d")).contains("hard link to a directory")
    );
    assert!(error_of(Layer::new().file("f", b"").file("f/below", b"")).contains("not a directory"));
    assert!(error_of(Layer::new().file(".wh.", b"")).contains("whiteout"));
    assert!(error_of(Layer::new().file(".wh...", b"")).contains("whiteout"));
    assert!(
        error_of(Layer::new().symlink("l", "l").file("l/x", b""))
            .contains("too many symbolic links")
    );
    assert!(error_of(Layer::new().entry("s", EntryType::GNUSparse, b"", "", 0)).contains("sparse"));
    let deep = format!("{}x", "d/".repeat(2000));
    assert!(
        error_of(
            Layer::new()
                .pax(&[("path", deep.as_bytes())])
                .file("p", b"")
        )
        .contains("1024")
    );
}

#[test]
fn members_are_named_from_the_root_with_or_without_a_slash() {
    let layer = Layer::new()
        .dir("/")
        .file("/etc/x", b"1")
        .file(".//etc//y", b"2")
        .file("//usr/../etc/z", b"3")
        .hard_link("/etc/w", "/etc/x")
        .file("/etc/.wh.none", b"");
    let upper = Layer::new().file("/etc/.wh.y", b"");
    let tree = merged(&[layer.tar(), upper.tar()]).unwrap();
    assert_eq!(text(&tree, "/etc/x") + &text(&tree, "/etc/z"), "13");
    assert_eq!(text(&tree, "/etc/w"), "1");
    assert!(at(&tree, "/etc/y").is_none());
}

#[test]
fn a_file_below_a_dangling_link_lands_where_the_link_points() {
    // As images of ostree systems are.
    let lower = Layer::new()
        .dir("usr")
        .symlink("usr/local", "../var/usrlocal")
        .symlink("opt", "var/opt")
        .symlink("evil", "../../../../etc");
    let upper = || {
        Layer::new()
            .file("usr/local/bin/tool", b"t")
            .file("opt/app/run", b"r")
    };
    let tree = merged(&[lower.tar(), upper().tar()]).unwrap();
    assert_eq!(text(&tree, "/var/usrlocal/bin/tool"), "t");
    assert_eq!(text(&tree, "/usr/local/bin/tool"), "t");
    assert_eq!(text(&tree, "/var/opt/app/run"), "r");
    // What one layer made there, a later one hides, and the layer's own whiteouts do not.
    let hiding = Layer::new().file("usr/local/bin/.wh.tool", b"");
    let lower = Layer::new().symlink("opt", "var/opt");
    let both = Layer::new()
        .file("opt/app/run", b"r")
        .file("var/.wh.opt", b"");
    let tree = merged(&[upper().tar(), hiding.tar()]).unwrap();
    assert!(at(&tree, "/usr/local/bin/tool").is_none());
    let tree = merged(&[lower.tar(), both.tar()]).unwrap();
    assert_eq!(text(&tree, "/var/opt/app/run"), "r");
    let error = error_of(
        Layer::new()
            .symlink("evil", "../../../../etc")
            .file("evil/passwd", b""),
    );
    assert!(error.contains("leads out of the image"), "{error}");
}

#[test]
fn kinds_replace_each_other_between_layers_and_links_reach_lower_ones() {
    let lower = Layer::new()
        .file("d/f", b"lower")
        .file("file", b"f")
        .symlink("link", "d");
    let upper = Layer::new()
        .hard_link("kept", "d/f")
        .file("d", b"now a file")
        .dir("file")
        .file("file/below", b"b")
        .dir("link")
        .file("link/own", b"o");
    let tree = merged(&[lower.tar(), upper.tar()]).unwrap();
    assert_eq!(text(&tree, "/kept"), "lower");
    assert_eq!(text(&tree, "/d"), "now a file");
    assert_eq!(text(&tree, "/file/below"), "b");
    assert_eq!(text(&tree, "/link/own"), "o");
    // A whiteout below what is no directory hides nothing and harms nothing.
    let under_file = Layer::new()
        .file("d/.wh.x", b"")
        .file("d/.wh..wh..opq", b"");
    let lower = Layer::new().file("d", b"a file");
    let tree = merged(&[lower.tar(), under_file.tar()]).unwrap();
    assert_eq!(text(&tree, "/d"), "a file");
}

#[test]
fn what_aufs_left_in_a_layer_is_no_file_of_the_image() {
    let layer = Layer::new()
        .dir(".wh..wh.plnk")
        .file(".wh..wh.plnk/12.34", b"x")
        .file(".wh..wh.aufs", b"")
        .file("f", b"f");
    let tree = merged(&[layer.tar()]).unwrap();
    assert_eq!(tree.dir(NodeId::ROOT).unwrap().len(), 1);
}

/// A header's field, overwritten; the checksum is made right again.
fn with_field(mut tar: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    tar[at..at + bytes.len()].copy_from_slice(bytes);
    let mut header = tar::Header::from_byte_slice(&tar[..512]).clone();
    header.set_cksum();
    tar[..512].copy_from_slice(header.as_bytes());
    tar
}

const MODE: usize = 100;
const UID: usize = 108;
const GID: usize = 116;
const SIZE: usize = 124;
const MTIME: usize = 136;

#[test]
fn a_blank_number_in_a_header_is_zero() {
    for blank in [[b' '; 12], [0; 12]] {
        let mut tar = Layer::new().file("f", b"").tar();
        for (at, len) in [(MODE, 8), (UID, 8), (GID, 8), (SIZE, 12), (MTIME, 12)] {
            tar = with_field(tar, at, &blank[..len]);
        }
        let tree = merged(&[tar]).unwrap();
        let meta = &at(&tree, "/f").unwrap().meta;
        assert_eq!((meta.mode, meta.uid, meta.gid, meta.mtime), (0, 0, 0, 0));
    }
    // Device numbers, too.
    let tar = Layer::new()
        .entry("c", EntryType::Char, b"", "", 0o600)
        .tar();
    let tree = merged(&[with_field(tar, 329, &[b' '; 16])]).unwrap();
    let console = at(&tree, "/c").unwrap();
    assert!(matches!(
        console.kind,
        Kind::CharDevice { major: 0, minor: 0 }
    ));
}

#[test]
fn numbers_in_headers_are_read_as_other_programs_write_them() {
    let file = || Layer::new().file("f", b"x").tar();
    let meta = |tar| at(&merged(&[tar]).unwrap(), "/f").unwrap().meta.clone();
    for (field, expected) in [
        (&b"   1750\0"[..], 1000),
        (b"0001750 ", 1000),
        (b"1750 \0\0\0", 1000),
        (b"1750\0 77", 1000),
        (b"77777777", 0o7777_7777),
        (b"\x80\0\0\0\xee\x6b\x28\0", 4_000_000_000),
    ] {
        assert_eq!(
            meta(with_field(file(), UID, field)).uid,
            expected,
            "{field:?}"
        );
    }
    for (field, expected) in [
        (
            &b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xf6"[..],
            -10,
        ),
        (b"\x80\0\0\0\0\0\0\x02\0\0\0\0", 1 << 33),
        (b"77777777777\0", 0o777_7777_7777),
    ] {
        assert_eq!(
            meta(with_field(file(), MTIME, field)).mtime,
            expected,
            "{field:?}"
        );
    }
    for (at, field) in [
        (UID, &b"12x4567\0"[..]),
        (UID, b"-1\0\0\0\0\0\0"),
        (UID, b"\xff\xff\xff\xff\xff\xff\xff\xff"),
        (UID, b"\x80\0\0\x01\0\0\0\0"),
        (SIZE, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
        (SIZE, b"\x80\x01\0\0\0\0\0\0\0\0\0\0"),
    ] {
        let error = merged(&[with_field(file(), at, field)]).err();
        assert!(error.is_some(), "{field:?}");
    }
}

#[test]
fn a_sum_of_signed_bytes_is_a_right_checksum_too() {
    let mut tar = Layer::new().file("f", b"").tar();
    tar[0] = 0xe9;
    let signed: i64 = (0..512)
        .map(|n| {
            if (148..156).contains(&n) {
                32
            } else {
                i64::from(tar[n] as i8)
            }
        })
        .sum();
    tar[148..156].copy_from_slice(format!("{signed:06o}\0 ").as_bytes());
    assert!(merged(&[tar.clone()]).is_ok());
    tar[148..156].copy_from_slice(format!("{:06o}\0 ", signed + 1).as_bytes());
    assert!(merged(&[tar]).is_err());
}

#[test]
fn a_pax_record_without_a_value_says_nothing_and_times_may_be_negative() {
    let layer = Layer::new()
        .pax(&[("uid", b""), ("path", b""), ("mtime", b"-1.25")])
        .file("f", b"x");
    let tree = merged(&[layer.tar()]).unwrap();
    let meta = &at(&tree, "/f").unwrap().meta;
    assert_eq!(
        (meta.uid, meta.mtime, meta.mtime_ns),
        (1000, -2, 750_000_000)
    );
}

#[test]
fn long_names_end_at_their_first_zero_byte() {
    let long = format!("{}\0junk\0", "n".repeat(200));
    let layer = Layer::new()
        .entry(
            "././@LongLink",
            EntryType::GNULongName,
            long.as_bytes(),
            "",
            0,
        )
        .file("short", b"x");
    let tree = merged(&[layer.tar()]).unwrap();
    assert!(
        tree.child(NodeId::ROOT, "n".repeat(200).as_bytes())
            .is_some()
    );
}

#[test]
fn metadata_of_every_kind_is_kept() {
    let capability = b"\x01\x00\x00\x02\x00\x20\n\x00=\n";
    let layer = Layer::new()
        .entry("./", EntryType::Directory, b"", "", 0o750)
        .pax(&[
            ("SCHILY.xattr.security.capability", capability),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("mtime", b"1234567890.5"),
            ("uid", b"3000000000"),
        ])
        .entry("ping", EntryType::Regular, b"elf", "", 0o4755)
        .hard_link("ping2", "ping")
        .entry("console", EntryType::Char, b"", "", 0o600)
        .entry("fifo", EntryType::Fifo, b"", "", 0o600)
        .pax(&[("linkpath", "t".repeat(300).as_bytes())])
        .symlink("long", "");
    let tree = merged(&[layer.tar()]).unwrap();
    assert_eq!(tree.node(NodeId::ROOT).meta.mode, 0o750);
    let ping = at(&tree, "/ping").unwrap();
    assert_eq!(
        (ping.meta.mode, ping.meta.uid, ping.meta.gid),
        (0o4755, 3_000_000_000, 100)
    );
    assert_eq!(
        (ping.meta.mtime, ping.meta.mtime_ns),
        (1_234_567_890, 500_000_000)
    );
    assert_eq!(
        ping.meta.xattrs.get(&b"security.capability"[..]).unwrap(),
        capability
    );
    assert_eq!(ping.meta.xattrs.len(), 1);
    assert_eq!(
        tree.child(NodeId::ROOT, b"ping"),
        tree.child(NodeId::ROOT, b"ping2")
    );
    assert!(matches!(
        at(&tree, "/console").unwrap().kind,
        Kind::CharDevice { major: 5, minor: 1 }
    ));
    assert!(
        matches!(&at(&tree, "/long").unwrap().kind, Kind::Symlink(target) if target.len() == 300)
    );
}

#[test]
fn truncated_and_oversized_layers_are_named() {
    let tar = Layer::new().file("f", &[7; 5000]).tar();
    let error = merged(&[tar[..2000].to_vec()]).err().unwrap().to_string();
    assert!(error.contains("truncated"), "{error}");
    let small = Limits {
        content_bytes: 4000,
        ..Limits::default()
    };
    assert!(matches!(
        merged_within(&[tar], small),
        Err(ImageError::Limit { .. })
    ));
    // A member that promises far more than there is costs nothing.
    let mut lying = Layer::new().file("f", b"").tar();
    lying[124..135].copy_from_slice(b"77777777777");
    assert!(merged(&[lying]).is_err());
    let few = Limits {
        entries: 5,
        ..Limits::default()
    };
    let many = (0..10).fold(Layer::new(), |layer, i| layer.file(&i.to_string(), b""));
    assert!(matches!(
        merged_within(&[many.tar()], few),
        Err(ImageError::Limit { .. })
    ));
}

#[test]
fn an_endless_name_is_refused_before_it_is_read() {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(EntryType::GNULongName);
    header.set_size(8 << 30);
    header.set_cksum();
    let endless = std::io::Read::chain(&header.as_bytes()[..], std::io::repeat(b'x'));
    let error = TarStream::new(endless)
        .next_entry()
        .unwrap_err()
        .to_string();
    assert!(error.contains("more than 1 MiB"), "{error}");
}

fn open(path: &Path, reference: Option<&str>) -> Result<OciImage> {
    let store = Store::open(path, path.parent().unwrap(), 1 << 30)?;
    OciImage::open(
        store,
        Wanted {
            reference,
            architecture: "amd64",
            level: CpuLevel::BASE,
        },
    )
}

fn build(path: &Path) -> Result<Tree> {
    let image = open(path, None)?;
    let mut tree = Tree::new(Limits::default());
    let mut spool = Spool::new(path.parent().unwrap(), 1 << 30)?;
    image.merge(&mut tree, &mut spool, &())?;
    Ok(tree)
}

fn two_layers() -> Vec<Vec<u8>> {
    vec![
        Layer::new().file("etc/a", b"1").file("etc/b", b"2").tar(),
        Layer::new()
            .file("etc/.wh.a", b"")
            .file("srv/c", b"3")
            .tar(),
    ]
}

#[test]
fn layouts_and_archives_of_them_give_the_same_tree() {
    let dir = tempfile::tempdir().unwrap();
    let layout = layout(dir.path(), &two_layers());
    let packed = dir.path().join("layout.tar");
    pack(&layout, &packed);
    let compressed = dir.path().join("layout.tar.gz");
    fs::write(&compressed, gzip(&fs::read(&packed).unwrap())).unwrap();
    let saved = docker_archive(dir.path(), &two_layers());
    for path in [&layout, &packed, &compressed, &saved] {
        let tree = build(path).unwrap();
        assert!(at(&tree, "/etc/a").is_none(), "{}", path.display());
        assert_eq!(text(&tree, "/etc/b") + &text(&tree, "/srv/c"), "23");
        let config = open(path, None).unwrap().config;
        assert_eq!(config.env, ["PATH=/bin", "LANG=C.UTF-8"]);
        assert_eq!((&config.working_dir[..], &config.user[..]), ("/srv", "app"));
        assert_eq!(
            (config.entrypoint, config.cmd),
            (vec!["/bin/app".to_owned()], vec![])
        );
    }
}

#[test]
fn every_blob_is_checked_against_its_digest() {
    let dir = tempfile::tempdir().unwrap();
    let layout = layout(dir.path(), &two_layers());
    let blobs: Vec<_> = fs::read_dir(layout.join("blobs/sha256"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    assert_eq!(blobs.len(), 4);
    for blob in blobs {
        let whole = fs::read(&blob).unwrap();
        for at in [0, whole.len() / 2, whole.len() - 1] {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x20;
            fs::write(&blob, damaged).unwrap();
            assert!(
                build(&layout).is_err(),
                "{} damaged at {at}",
                blob.display()
            );
        }
        let longer = [&whole[..], b"more"].concat();
        fs::write(&blob, longer).unwrap();
        assert!(build(&layout).is_err(), "{} lengthened", blob.display());
        fs::write(&blob, whole).unwrap();
    }
    build(&layout).unwrap();
}

#[test]
fn a_layer_swapped_for_another_of_its_own_digest_is_caught_by_the_diff_id() {
    let dir = tempfile::tempdir().unwrap();
    let evil = vec![Layer::new().file("evil", b"x").tar()];
    let saved = docker_archive(dir.path(), &evil);
    // The same archive with the configuration of another image.
    let honest = config(&[Layer::new().file("good", b"y").tar()]);
    let name = "other.json";
    let manifest =
        format!(r#"[{{"Config":"{name}","RepoTags":null,"Layers":["layer0/layer.tar"]}}]"#);
    let archive = Layer::new()
        .file("layer0/layer.tar", &evil[0])
        .file(name, &honest)
        .file("manifest.json", manifest.as_bytes());
    fs::write(&saved, archive.tar()).unwrap();
    assert!(matches!(build(&saved), Err(ImageError::Digest { .. })));
}

#[test]
fn hostile_names_in_manifests_reach_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let manifest = r#"[{"Config":"../../../etc/passwd","RepoTags":[],"Layers":["/etc/shadow"]}]"#;
    let path = dir.path().join("evil.tar");
    fs::write(
        &path,
        Layer::new()
            .file("manifest.json", manifest.as_bytes())
            .tar(),
    )
    .unwrap();
    assert!(
        build(&path)
            .err()
            .unwrap()
            .to_string()
            .contains("no member")
    );
    let layout = layout(dir.path(), &two_layers());
    let evil =
        serde_json::json!({"mediaType": "", "digest": "sha256:../../../../etc/passwd", "size": 1});
    write_index(&layout, &[evil]);
    assert!(
        build(&layout)
            .err()
            .unwrap()
            .to_string()
            .contains("lower-case hex")
    );
}

#[test]
fn the_image_is_chosen_by_platform_and_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let layout = layout(dir.path(), &two_layers());
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
    let mut ours = index["manifests"][0].clone();
    ours["platform"] = serde_json::json!({"architecture": "amd64", "os": "linux"});
    ours["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": "one"});
    let mut arm = blob(&layout, "application/vnd.oci.image.manifest.v1+json", b"{}");
    arm["platform"] = serde_json::json!({"architecture": "arm64", "os": "linux"});
    write_index(&layout, &[arm.clone(), ours.clone()]);
    build(&layout).unwrap();
    write_index(&layout, &[arm.clone()]);
    assert!(
        build(&layout)
            .err()
            .unwrap()
            .to_string()
            .contains("linux/arm64")
    );
    let mut other = blob(
        &layout,
        "application/vnd.oci.image.manifest.v1+json",
        b"{ }",
    );
    other["annotations"] =
        serde_json::json!({"org.opencontainers.image.ref.name": "docker.io/library/two:latest"});
    write_index(&layout, &[ours, other]);
    let error = open(&layout, None).err().unwrap().to_string();
    assert!(error.contains("one") && error.contains("two"), "{error}");
    open(&layout, Some("one")).unwrap();
    // "two" is found by its short name, and then is no manifest.
    assert!(
        open(&layout, Some("two"))
            .err()
            .unwrap()
            .to_string()
            .contains("manifest")
    );
    assert!(
        open(&layout, Some("three"))
            .err()
            .unwrap()
            .to_string()
            .contains("choose one")
    );
}

#[test]
fn of_several_variants_the_best_that_the_cpu_runs_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let layout = layout(dir.path(), &two_layers());
    let variants = [
        None,
        Some("v1"),
        Some("v2"),
        Some("v3"),
        Some("v4"),
        Some("v9"),
    ];
    let described: Vec<_> = variants
        .iter()
        .enumerate()
        .map(|(n, variant)| {
            let bytes = format!("{}{{}}", " ".repeat(n));
            let manifest = "application/vnd.oci.image.manifest.v1+json";
            let mut it = blob(&layout, manifest, bytes.as_bytes());
            it["platform"] = serde_json::json!({"architecture": "amd64", "os": "linux"});
            if let Some(variant) = variant {
                it["platform"]["variant"] = (*variant).into();
            }
            it
        })
        .collect();
    let chosen = |entries: &[usize], level: &str| -> Result<String> {
        let manifests: Vec<_> = entries.iter().map(|&n| described[n].clone()).collect();
        let index = serde_json::json!({ "manifests": manifests });
        let index = serde_json::from_value(index).unwrap();
        let wanted = Wanted {
            reference: None,
            architecture: "amd64",
            level: CpuLevel::of_variant(level).unwrap(),
        };
        let store = Store::open(&layout, dir.path(), 1 << 20)?;
        let found = super::oci::by_platform(&index, wanted, &store)?;
        Ok(found.digest.clone())
    };
    for (entries, level, expected) in [
        (&[0, 2, 3][..], "v1", 0),
        (&[0, 2, 3], "v2", 2),
        (&[3, 2, 0], "v4", 3),
        (&[4, 1, 2], "v3", 2),
        (&[0, 5], "v4", 0),
    ] {
        let digest = chosen(entries, level).unwrap();
        assert_eq!(digest, described[expected]["digest"], "{entries:?} {level}");
    }
    let error = chosen(&[3, 4], "v2").unwrap_err().to_string();
    assert!(
        error.contains("v2") && error.contains("linux/amd64/v3"),
        "{error}"
    );
    // One that is named twice for one level is ambiguous.
    assert!(chosen(&[0, 1], "v4").is_err());
    assert!(CpuLevel::of_host() >= CpuLevel::BASE);
}

#[test]
fn things_that_are_no_images_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    for (bytes, expected) in [
        (&b""[..], "empty"),
        (b"hello, I am a text file", "truncated"),
        (&[0; 4096], "holds no image"),
        (&[b'x'; 4096], "not a tar archive"),
    ] {
        fs::write(&path, bytes).unwrap();
        let error = build(&path).err().unwrap().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn no_damaged_layer_causes_a_panic(
        hits in prop::collection::vec((0usize..8000, any::<u8>()), 1..16),
        fix_sums in any::<bool>(),
    ) {
        let mut tar = Layer::new()
            .dir("a").file("a/f", &[1; 700]).symlink("l", "a/f").hard_link("h", "a/f")
            .pax(&[("SCHILY.xattr.user.x", b"1"), ("mtime", b"1.5")]).file("p", b"x")
            .file("a/.wh.f", b"").entry("c", EntryType::Char, b"", "", 0o600).tar();
        let len = tar.len();
        for (at, value) in hits {
            tar[at % len] = value;
        }
        if fix_sums {
            // Else nearly every case stops at the first header's checksum.
            for block in tar.chunks_exact_mut(512) {
                if block[0] != 0 && block[257..262] == *b"ustar" {
                    let mut header = tar::Header::from_byte_slice(block).clone();
                    header.set_cksum();
                    block.copy_from_slice(header.as_bytes());
                }
            }
        }
        let limits = Limits { content_bytes: 1 << 20, ..Limits::default() };
        let _ = merged_within(&[tar], limits);
    }
}
