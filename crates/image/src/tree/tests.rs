use super::*;

fn dir(tree: &mut Tree, path: &str) {
    tree.put_at(
        path,
        Node {
            meta: Meta::root(0o755, 0),
            kind: Kind::empty_dir(),
        },
    )
    .unwrap();
}

fn link(tree: &mut Tree, path: &str, target: &str) {
    let kind = Kind::Symlink(target.as_bytes().to_vec());
    tree.put_at(
        path,
        Node {
            meta: Meta::root(0o777, 0),
            kind,
        },
    )
    .unwrap();
}

fn tree() -> Tree {
    Tree::new(Limits::default())
}

#[test]
fn paths_that_lead_elsewhere_are_refused() {
    assert_eq!(components(b"./usr//bin/."), Ok(vec![&b"usr"[..], b"bin"]));
    assert_eq!(components(b"./"), Ok(vec![]));
    assert_eq!(components(b"/"), Ok(vec![]));
    assert_eq!(
        components(b"//etc/./passwd"),
        Ok(vec![&b"etc"[..], b"passwd"])
    );
    assert_eq!(components(b"a/../b"), Ok(vec![&b"b"[..]]));
    for leaving in [&b".."[..], b"/..", b"a/../../b", b"/../etc", b"./../x"] {
        assert_eq!(components(leaving), Err(PathError::DotDot));
    }
    assert_eq!(components(b"a\0b"), Err(PathError::Nul));
    assert_eq!(components(&[b'a'; 256]), Err(PathError::NameTooLong));
}

#[test]
fn links_are_followed_inside_the_tree_only() {
    let mut tree = tree();
    dir(&mut tree, "/usr/lib/deep");
    link(&mut tree, "/lib", "usr/lib");
    link(&mut tree, "/abs", "/lib/deep");
    link(&mut tree, "/usr/lib/up", "../../abs");
    link(&mut tree, "/out", "../../etc");
    link(&mut tree, "/loop", "loop");
    let deep = tree.find("/usr/lib/deep");
    assert!(deep.is_some());
    for path in ["/lib/deep", "/abs", "/usr/lib/up", "/lib/up"] {
        assert_eq!(tree.find(path), deep, "{path}");
    }
    assert_eq!(tree.resolve(&[b"out", b"passwd"]), Err(PathError::Escape));
    assert_eq!(tree.resolve(&[b"loop"]), Err(PathError::LinkLoop));
    assert_eq!(tree.resolve(&[b"lib", b"none"]), Err(PathError::Missing));
}

#[test]
fn new_files_go_where_a_directory_link_points() {
    let mut tree = tree();
    dir(&mut tree, "/usr/sbin");
    link(&mut tree, "/sbin", "usr/sbin");
    dir(&mut tree, "/sbin/made/deeper");
    assert!(tree.find("/usr/sbin/made/deeper").is_some());
}

fn fifo(tree: &mut Tree, path: &str) -> Result<NodeId> {
    let node = Node {
        meta: Meta::root(0o644, 0),
        kind: Kind::Fifo,
    };
    tree.put_at(path, node)
}

#[test]
fn a_dangling_link_is_made_to_lead_somewhere_inside_the_tree() {
    let mut tree = tree();
    dir(&mut tree, "/usr");
    link(&mut tree, "/usr/local", "../var/usrlocal");
    link(&mut tree, "/opt", "/var/opt/deep");
    link(&mut tree, "/srv", "opt/../more");
    for path in ["/usr/local/bin/x", "/opt/x", "/srv/x"] {
        fifo(&mut tree, path).unwrap();
    }
    for path in ["/var/usrlocal/bin/x", "/var/opt/deep/x", "/var/opt/more/x"] {
        assert!(tree.find(path).is_some(), "{path}");
    }
    // The links are still links.
    for link in [&b"opt"[..], b"srv"] {
        let id = tree.child(NodeId::ROOT, link).unwrap();
        assert!(matches!(tree.node(id).kind, Kind::Symlink(_)));
    }
    for (name, target) in [
        ("/out", "../../etc"),
        ("/self", "self/x"),
        ("/file", "usr/local/bin/x"),
    ] {
        link(&mut tree, name, target);
        assert!(fifo(&mut tree, &format!("{name}/f")).is_err(), "{name}");
    }
    let long = "y".repeat(300);
    link(&mut tree, "/long", &long);
    assert!(fifo(&mut tree, "/long/f").is_err());
}

#[test]
fn too_many_entries_or_names_hit_the_limit() {
    let mut tree = Tree::new(Limits {
        entries: 10,
        ..Limits::default()
    });
    let made = (0..10).filter(|i| {
        tree.put_at(
            &format!("/{i}"),
            Node {
                meta: Meta::default(),
                kind: Kind::Fifo,
            },
        )
        .is_ok()
    });
    assert!(made.count() < 10);
    let mut tree = Tree::new(Limits {
        metadata_bytes: 1000,
        ..Limits::default()
    });
    let kind = Kind::Symlink(vec![b'x'; 2000]);
    assert!(
        tree.put_at(
            "/l",
            Node {
                meta: Meta::default(),
                kind
            }
        )
        .is_err()
    );
}
