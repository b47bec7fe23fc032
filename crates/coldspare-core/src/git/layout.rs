//! The layout of a bare git repository and the order in which its parts may change.
//!
//! Decides, from the shape of a path alone, which part of a repository it is, when it is captured and when it is
//! applied. A path that only looks like git costs nothing but its place in the order.
//!
//! Invariants: objects are applied before the references that may need them, and removed after; a pack's index is
//! applied after the pack and removed before it (G1).

use serde::{Deserialize, Serialize};

use crate::path::RelPath;
use crate::seeded_bug;

/// A part of a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// `objects/<2 hex>/…`.
    LooseObject,
    /// `objects/pack/*` except `.idx` and what is derived.
    Pack,
    /// `objects/pack/*.idx`: what makes a pack visible.
    PackIndex,
    /// Layers of a commit graph: rebuildable, named by the top.
    DerivedLayer,
    /// Multi-pack index, commit graph and its chain: rebuildable, name packs and layers.
    DerivedTop,
    /// A reference of its own file, in either namespace; tables of the reftable format.
    LooseRef,
    /// `packed-refs`, `stash-packed-refs`, the list of the reftable format.
    PackedRefs,
    /// `HEAD`.
    Head,
    /// Everything else, in a repository or not.
    Other,
}

/// When an operation is performed on the standby; lower first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[repr(u8)]
pub enum ApplyRank {
    /// Loose objects, and new folders of them.
    Object = 10,
    /// Packs and their side files.
    Pack = 11,
    /// Pack indexes.
    PackIndex = 12,
    /// Folders that are wholly new, among them whole repositories.
    NewTree = 13,
    /// Files that are not git's, configuration, hooks, alternates.
    Rest = 14,
    /// Commit-graph layers.
    DerivedLayer = 15,
    /// Multi-pack index, commit graphs.
    DerivedTop = 16,
    /// Loose references.
    Ref = 17,
    /// Packed references.
    PackedRefs = 18,
    /// `HEAD`.
    Head = 19,
    /// Folders that are at another path now, none of them git's; after the new folders that they go into.
    Rename = 20,
    /// Removal of loose references, after the packed ones are there.
    DeleteRef = 30,
    /// Removal of what names packs and layers.
    DeleteDerivedTop = 31,
    /// Removal of commit-graph layers.
    DeleteDerivedLayer = 32,
    /// Removal of pack indexes.
    DeletePackIndex = 33,
    /// Removal of packs and loose objects.
    DeleteObject = 34,
    /// Removal of everything else.
    DeleteRest = 35,
    /// Attributes of directories, changed by the work above.
    DirAttributes = 40,
}

/// The place of most operations among those of one rank: what borrows comes in a later one, and goes in an earlier one.
pub const FIRST_WAVE: u8 = 1;

/// When a path of a repository is captured; all repositories of a cycle pass one stage before any enters the next (G2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CapturePass {
    /// References of both namespaces, and `HEAD`.
    References,
    /// What else names objects: reference logs, the index and `HEAD` of work trees, where a shallow history ends.
    Mentions,
    /// Loose objects, after the references were read: all that those need is on disk by then.
    LooseObjects,
    /// Packs, after the loose objects: an object that moves from there to a pack meanwhile is met in one of the two.
    Packs,
    /// What is derived from objects, after all that it may name.
    Derived,
    /// Everything else, in a repository or not.
    Rest,
}

/// The part that a path is, by its shape.
pub fn part(path: &RelPath) -> Part {
    let components: Vec<&[u8]> = path.components().collect();
    // The first folder of git's own decides: a branch may well be called `objects`.
    let mark = components.iter().position(|c| matches!(*c, b"objects" | b"refs" | b"stash-refs" | b"reftable"));
    if let Some(at) = mark {
        let inside = &components[at + 1..];
        return match components[at] {
            b"objects" => part_of_objects(inside),
            b"reftable" if inside == [b"tables.list"] => Part::PackedRefs,
            _ => Part::LooseRef,
        };
    }
    match path.name() {
        b"packed-refs" | b"stash-packed-refs" => Part::PackedRefs,
        b"HEAD" => Part::Head,
        _ => Part::Other,
    }
}

fn part_of_objects(inside: &[&[u8]]) -> Part {
    match inside {
        [dir] | [dir, _] if dir.len() == 2 && dir.iter().all(u8::is_ascii_hexdigit) => Part::LooseObject,
        [b"pack"] => Part::Pack,
        [b"pack", name] if name.starts_with(b"multi-pack-index") => Part::DerivedTop,
        [b"pack", b"multi-pack-index.d", ..] => Part::DerivedTop,
        [b"pack", name] if name.ends_with(b".idx") => Part::PackIndex,
        [b"pack", ..] => Part::Pack,
        [b"info", b"commit-graph"] | [b"info", b"commit-graphs", b"commit-graph-chain"] => Part::DerivedTop,
        [b"info", b"commit-graphs", ..] => Part::DerivedLayer,
        _ => Part::Other,
    }
}

impl ApplyRank {
    /// When a file, or a link, is put in place.
    pub fn of_put(path: &RelPath) -> ApplyRank {
        match part(path) {
            Part::LooseObject if seeded_bug!(ReferencesBeforeObjects) => ApplyRank::Head,
            Part::PackIndex if seeded_bug!(IndexBeforePack) => ApplyRank::Object,
            Part::DerivedTop if seeded_bug!(DerivedBeforePacks) => ApplyRank::Object,
            Part::DerivedLayer if seeded_bug!(ChainBeforeLayers) => ApplyRank::Head,
            Part::PackedRefs if seeded_bug!(PackedBeforeLoose) => ApplyRank::Rest,
            Part::LooseObject => ApplyRank::Object,
            Part::Pack => ApplyRank::Pack,
            Part::PackIndex => ApplyRank::PackIndex,
            Part::DerivedLayer => ApplyRank::DerivedLayer,
            Part::DerivedTop => ApplyRank::DerivedTop,
            Part::LooseRef => ApplyRank::Ref,
            Part::PackedRefs => ApplyRank::PackedRefs,
            Part::Head => ApplyRank::Head,
            Part::Other => ApplyRank::Rest,
        }
    }

    /// When a folder that is wholly new is put in place.
    pub fn of_new_tree(path: &RelPath) -> ApplyRank {
        match ApplyRank::of_put(path) {
            ApplyRank::Rest => ApplyRank::NewTree,
            rank => rank,
        }
    }

    /// When a path is removed.
    pub fn of_delete(path: &RelPath) -> ApplyRank {
        match part(path) {
            Part::LooseRef if seeded_bug!(LooseGoBeforePacked) => ApplyRank::Rest,
            Part::LooseObject | Part::Pack if seeded_bug!(ObjectsGoFirst) => ApplyRank::Object,
            Part::PackIndex if seeded_bug!(IndexGoesAfterPack) => ApplyRank::DeleteRest,
            Part::DerivedTop if seeded_bug!(DerivedGoesAfterPacks) => ApplyRank::DeleteRest,
            Part::LooseRef => ApplyRank::DeleteRef,
            Part::DerivedTop => ApplyRank::DeleteDerivedTop,
            Part::DerivedLayer => ApplyRank::DeleteDerivedLayer,
            Part::PackIndex => ApplyRank::DeletePackIndex,
            Part::LooseObject | Part::Pack => ApplyRank::DeleteObject,
            Part::PackedRefs | Part::Head | Part::Other => ApplyRank::DeleteRest,
        }
    }
}

impl CapturePass {
    /// All of them, in their order.
    pub const ALL: [CapturePass; 6] = [
        CapturePass::References,
        CapturePass::Mentions,
        CapturePass::LooseObjects,
        CapturePass::Packs,
        CapturePass::Derived,
        CapturePass::Rest,
    ];

    /// When a path is captured; `inside` is the path below a repository, empty for the repository's own folder.
    pub fn of(inside: &[u8]) -> CapturePass {
        let mut parts = inside.split(|&b| b == b'/');
        let (first, second, third) = (parts.next().unwrap_or_default(), parts.next(), parts.next());
        match (first, second, third) {
            (b"refs" | b"stash-refs" | b"reftable", _, _) => CapturePass::References,
            (b"HEAD" | b"packed-refs" | b"stash-packed-refs", None, _) => CapturePass::References,
            (name, None, _) if MENTIONING_NAMES.contains(&name) => CapturePass::Mentions,
            (b"logs" | b"worktrees", _, _) => CapturePass::Mentions,
            (b"objects", Some(b"pack"), Some(name)) if name.starts_with(b"multi-pack-index") => CapturePass::Derived,
            (b"objects", Some(b"pack"), _) => CapturePass::Packs,
            (b"objects", Some(b"info"), None | Some(b"commit-graph" | b"commit-graphs")) => CapturePass::Derived,
            (b"objects", Some(b"info"), _) => CapturePass::Rest,
            (b"objects", _, _) => CapturePass::LooseObjects,
            _ => CapturePass::Rest,
        }
    }
}

/// The folders above, or at, `path` that could be a repository by the shape of what follows, the outermost first.
pub fn possible_repositories(path: &RelPath) -> Vec<RelPath> {
    let mut out: Vec<RelPath> = path.ancestors().collect();
    out.push(path.clone());
    let is_mark = |c: &[u8]| matches!(c, b"objects" | b"refs" | b"stash-refs" | b"reftable" | b"logs" | b"worktrees");
    let next_is_mark = |base: &RelPath| path.below(base).and_then(|below| below.split(|&b| b == b'/').next()).is_some_and(is_mark);
    out.retain(|base| base == path || next_is_mark(base));
    out
}

/// Whether a path is, by its shape, a pack itself: no side file of one.
pub fn is_pack(path: &RelPath) -> bool {
    path.as_bytes().ends_with(b".pack") && part(path) == Part::Pack
}

/// Whether a path is, by its shape, a pack's reverse index.
pub fn is_reverse_index(path: &RelPath) -> bool {
    path.as_bytes().ends_with(b".rev") && part(path) == Part::Pack
}

/// The file with this ending that belongs to the same pack as `path`: `a.pack` of `a.idx`. `None` for what has no ending.
pub fn beside(path: &RelPath, ending: &str) -> Option<RelPath> {
    let stem = path.name().iter().rposition(|&b| b == b'.')?;
    let kept = path.as_bytes().len() - path.name().len() + stem + 1;
    RelPath::new([&path.as_bytes()[..kept], ending.as_bytes()].concat()).ok()
}

/// The file of a repository that names the folders that it borrows objects from.
pub const ALTERNATES: &[u8] = b"objects/info/alternates";

/// The repository whose [`ALTERNATES`] a path is.
pub fn borrower(path: &RelPath) -> Option<RelPath> {
    path.ancestors().find(|base| path.below(base) == Some(ALTERNATES))
}

/// Entries of a repository's own folder that hold references.
pub const REFERENCE_NAMES: [&[u8]; 6] = [b"HEAD", b"packed-refs", b"stash-packed-refs", b"refs", b"stash-refs", b"reftable"];

/// Entries of a repository's own folder that are, or hold, what else names objects.
pub const MENTIONING_NAMES: [&[u8]; 7] = [b"logs", b"worktrees", b"index", b"shallow", b"ORIG_HEAD", b"FETCH_HEAD", b"MERGE_HEAD"];

/// What an entry of a folder is, as far as it tells a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A folder.
    Folder,
    /// A file.
    File,
    /// Something else, or nobody knows.
    Other,
}

/// Whether a directory that holds these entries is a repository: `HEAD`, which is no folder, `objects` and `refs`, which
/// are no files.
pub fn is_repository<'a>(entries: impl Iterator<Item = (&'a [u8], Kind)>) -> bool {
    let mut found = 0u8;
    for (name, kind) in entries {
        found |= match name {
            b"HEAD" if kind != Kind::Folder => 1,
            b"objects" if kind != Kind::File => 2,
            b"refs" if kind != Kind::File => 4,
            _ => 0,
        };
    }
    found == 7
}

/// Whether git never means this path to outlive the writing process: locks, temporary files, quarantines.
///
/// `inside` is the path below a repository. Copying one of these would make the next push fail.
pub fn never_carried(inside: &[u8]) -> bool {
    if seeded_bug!(TransientFilesTravel) {
        return false;
    }
    let name = inside.rsplit(|&b| b == b'/').next().unwrap_or(inside);
    if name.ends_with(b".lock") || inside == b"gc.pid" || inside == b"packed-refs.new" || inside == b"stash-packed-refs.new" {
        return true;
    }
    let Some(in_objects) = inside.strip_prefix(b"objects/") else {
        return inside.starts_with(b"reftable/") && is_temporary_table(name);
    };
    let transient = |c: &[u8]| [&b"tmp_"[..], b"incoming-", b".tmp-"].iter().any(|p| c.starts_with(p));
    in_objects.split(|&b| b == b'/').any(transient)
}

/// Whether a name could be one of [`never_carried`], for a cheap first look.
pub fn looks_transient(name: &[u8]) -> bool {
    name.ends_with(b".lock")
        || name == b"gc.pid"
        || name.ends_with(b"packed-refs.new")
        || is_temporary_table(name)
        || [&b"tmp_"[..], b"incoming-", b".tmp-"].iter().any(|p| name.starts_with(p))
}

/// `….ref.temp.A1b2C3`: a table of reftable's that is being written.
fn is_temporary_table(name: &[u8]) -> bool {
    name.windows(6).any(|part| part == b".temp.")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(s: &str) -> RelPath {
        RelPath::new(s.as_bytes()).unwrap()
    }

    fn check(p: &str, expected: Part) {
        assert_eq!(part(&path(p)), expected, "{p}");
    }

    #[test]
    fn alternates_are_of_the_repository_that_they_are_in() {
        let of = |path: &str| borrower(&RelPath::new(path.as_bytes()).unwrap()).map(|base| base.to_string());
        assert_eq!(of("a/r/objects/info/alternates"), Some("a/r".into()));
        assert_eq!(of("objects/info/alternates"), Some(".".into()));
        assert_eq!(of("a/xobjects/info/alternates"), None);
        assert_eq!(of("a/r/objects/info"), None);
    }

    #[test]
    fn parts_are_told_by_shape() {
        check("r/objects/ab", Part::LooseObject);
        check("r/objects/ab/cdef", Part::LooseObject);
        check("r/objects/pack/pack-1.pack", Part::Pack);
        check("r/objects/pack/pack-1.rev", Part::Pack);
        check("r/objects/pack/pack-1.idx", Part::PackIndex);
        check("r/objects/pack/multi-pack-index", Part::DerivedTop);
        check("r/objects/pack/multi-pack-index-1.bitmap", Part::DerivedTop);
        check("r/objects/info/alternates", Part::Other);
        check("r/objects/info/commit-graph", Part::DerivedTop);
        check("r/objects/info/commit-graphs/commit-graph-chain", Part::DerivedTop);
        check("r/objects/info/commit-graphs/graph-1.graph", Part::DerivedLayer);
        check("r/refs/heads/objects/ab/x", Part::LooseRef);
        check("r/stash-refs/pull-requests/1/from", Part::LooseRef);
        check("r/packed-refs", Part::PackedRefs);
        check("r/stash-packed-refs", Part::PackedRefs);
        check("r/reftable/0x1-0x2.ref", Part::LooseRef);
        check("r/reftable/tables.list", Part::PackedRefs);
        check("r/HEAD", Part::Head);
        check("r/config", Part::Other);
        check("shared/data/attachments/1", Part::Other);
    }

    #[test]
    fn objects_come_before_references_and_go_after_them() {
        let put = |p: &str| ApplyRank::of_put(&path(p));
        let delete = |p: &str| ApplyRank::of_delete(&path(p));
        let order = [
            put("r/objects/ab/c"),
            put("r/objects/pack/pack-1.pack"),
            put("r/objects/pack/pack-1.idx"),
            ApplyRank::of_new_tree(&path("r")),
            put("r/objects/info/alternates"),
            put("r/objects/info/commit-graphs/graph-1.graph"),
            put("r/objects/info/commit-graphs/commit-graph-chain"),
            put("r/refs/heads/main"),
            put("r/packed-refs"),
            put("r/HEAD"),
            delete("r/refs/heads/main"),
            delete("r/objects/pack/multi-pack-index"),
            delete("r/objects/info/commit-graphs/graph-1.graph"),
            delete("r/objects/pack/pack-1.idx"),
            delete("r/objects/pack/pack-1.pack"),
            delete("r"),
            ApplyRank::DirAttributes,
        ];
        assert!(order.is_sorted_by(|a, b| a < b), "{order:?}");
        assert_eq!(ApplyRank::of_new_tree(&path("r/refs/heads/feature")), ApplyRank::Ref);
        assert_eq!(ApplyRank::of_new_tree(&path("r/objects/ab")), ApplyRank::Object);
    }

    #[test]
    fn objects_are_captured_after_references() {
        let check = |inside: &str, expected| assert_eq!(CapturePass::of(inside.as_bytes()), expected, "{inside}");
        for inside in [
            "refs",
            "refs/heads/objects",
            "stash-refs/pull-requests/1/from",
            "packed-refs",
            "stash-packed-refs",
            "HEAD",
            "reftable/tables.list",
        ] {
            check(inside, CapturePass::References);
        }
        for inside in ["objects", "objects/ab", "objects/ab/cdef"] {
            check(inside, CapturePass::LooseObjects);
        }
        for inside in ["objects/pack", "objects/pack/pack-1.idx", "objects/pack/pack-1.bitmap"] {
            check(inside, CapturePass::Packs);
        }
        for inside in
            ["objects/pack/multi-pack-index", "objects/info", "objects/info/commit-graphs/graph-1.graph", "objects/info/commit-graph"]
        {
            check(inside, CapturePass::Derived);
        }
        for inside in ["logs/refs/heads/main", "logs", "worktrees/w/HEAD", "worktrees/w/index", "index", "shallow", "ORIG_HEAD"] {
            check(inside, CapturePass::Mentions);
        }
        for inside in ["", "config", "hooks/HEAD", "objects/info/alternates", "hooks/index"] {
            check(inside, CapturePass::Rest);
        }
        assert!(CapturePass::ALL.is_sorted());
    }

    #[test]
    fn a_repository_is_looked_for_above_what_only_it_has() {
        let check = |p: &str, expected: &[&str]| {
            let found: Vec<String> = possible_repositories(&path(p)).iter().map(|p| p.to_string()).collect();
            assert_eq!(found, expected, "{p}");
        };
        check("a/1/refs/heads", &["a/1", "a/1/refs/heads"]);
        check("a/objects/1/refs", &["a", "a/objects/1", "a/objects/1/refs"]);
        check("a/b", &["a/b"]);
        check("a/1/logs/refs", &["a/1", "a/1/logs", "a/1/logs/refs"]);
        check("objects/pack", &[".", "objects/pack"]);
    }

    #[test]
    fn transient_names_stay_at_home() {
        for p in [
            "refs/heads/main.lock",
            "config.lock",
            "gc.pid",
            "packed-refs.new",
            "objects/pack/tmp_pack_x",
            "objects/pack/.tmp-1-pack-2.pack",
            "objects/tmp_objdir-incoming-1/ab/c",
            "objects/incoming-x",
            "objects/ab/tmp_obj_1",
        ] {
            assert!(never_carried(p.as_bytes()), "{p}");
            assert!(p.split('/').any(|c| looks_transient(c.as_bytes())), "{p}");
        }
        for p in ["refs/heads/tmp_x", "hooks/incoming-check", "refs/heads/lock", "objects/pack/pack-1.keep", "x/gc.pid"] {
            assert!(!never_carried(p.as_bytes()), "{p}");
        }
        let is = |entries: &[(&[u8], Kind)]| is_repository(entries.iter().copied());
        let (head, refs, objects) = ((&b"HEAD"[..], Kind::File), (&b"refs"[..], Kind::Folder), (&b"objects"[..], Kind::Other));
        assert!(is(&[head, refs, (b"config", Kind::File), objects]));
        assert!(!is(&[head, refs]));
        assert!(!is(&[(b"HEAD", Kind::Folder), refs, objects]));
        assert!(!is(&[head, (b"refs", Kind::File), objects]));
    }
}
