//! Who reads the standby's tree while a changeset is applied: never a repository that git would refuse (G1).
//!
//! Before each call that changes the tree every repository in it is read as git reads it: a loose reference before a
//! packed one, packs by their indexes, objects of alternates. Packs and objects are none but by their names; indexes are
//! real, since the standby reads them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use coldspare_core::changeset::Totals;
use coldspare_core::exclude::Exclude;
use coldspare_core::{Baseline, Seq, SessionId};
use coldspare_os::FileKind;
use coldspare_sim::model::{CallKind, Draft, Expected, ModelDisk, ModelStore};
use coldspare_standby::{RootSetup, Standby, Store};

const HOME: &str = "/home";
const SESSION: SessionId = SessionId([1; 16]);

/// Contents by path.
type Files = BTreeMap<String, Vec<u8>>;
type References = BTreeMap<String, String>;

/// Applies what git does to a home, with a reader who looks between any two calls.
pub(crate) fn meet_whole_repositories() -> Result<(), String> {
    let mut copy = Copy::new();
    copy.apply(Baseline::Full, |c| c.dir("repos"))?;
    // The fork's name comes first.
    copy.delta(|c| {
        repository(c, "repos/2", &[("main", "one")]);
        object(c, "repos/2", "one");
        repository(c, "repos/1", &[("main", "one")]);
        c.file("repos/1/objects/info/alternates", b"../../2/objects\n");
    })?;
    copy.delta(|c| {
        c.dir(&format!("repos/2/objects/{}", &name("two")[..2]));
        object(c, "repos/2", "two");
        reference(c, "repos/2", "main", "two");
        reference(c, "repos/2", "topic", "one");
    })?;
    copy.delta(|c| {
        pack(c, "repos/2", "a", &["three", "four"]);
        reference(c, "repos/2", "main", "four");
    })?;
    // A repack, with what is derived from it.
    copy.delta(|c| {
        pack(c, "repos/2", "b", &["one", "two", "three", "four"]);
        c.file("repos/2/objects/pack/multi-pack-index", b"pack-b");
        c.dir("repos/2/objects/info/commit-graphs");
        c.file("repos/2/objects/info/commit-graphs/graph-b.graph", b"four");
        c.file("repos/2/objects/info/commit-graphs/commit-graph-chain", b"graph-b.graph");
        remove_pack(c, "a");
        ["one", "two"].iter().for_each(|of| c.delete(&loose("repos/2", of)));
    })?;
    // Another layer; the folder is there already.
    copy.delta(|c| {
        c.file("repos/2/objects/info/commit-graphs/graph-c.graph", b"four");
        c.file("repos/2/objects/info/commit-graphs/commit-graph-chain", b"graph-b.graph\ngraph-c.graph");
    })?;
    // References are packed.
    copy.delta(|c| {
        c.file("repos/2/packed-refs", packed(&[("main", "four"), ("topic", "one")]).as_bytes());
        c.delete("repos/2/refs/heads/main");
        c.delete("repos/2/refs/heads/topic");
    })?;
    // A branch is deleted and made again.
    copy.delta(|c| {
        c.file("repos/2/packed-refs", packed(&[("main", "four")]).as_bytes());
        reference(c, "repos/2", "topic", "two");
    })?;
    // A repack that has no use for the multi-pack index.
    copy.delta(|c| {
        pack(c, "repos/2", "c", &["one", "two", "three", "four"]);
        c.delete("repos/2/objects/pack/multi-pack-index");
        remove_pack(c, "b");
    })?;
    copy.delta(|c| {
        c.delete("repos/1");
        c.delete("repos/2");
    })
}

fn repository(c: &mut Draft, at: &str, heads: &[(&str, &str)]) {
    for dir in ["", "/objects", "/objects/info", "/objects/pack", "/refs", "/refs/heads"] {
        c.dir(&format!("{at}{dir}"));
    }
    c.dir(&format!("{at}/objects/{}", &name("one")[..2]));
    c.file(&format!("{at}/HEAD"), b"ref: refs/heads/main\n");
    heads.iter().for_each(|(branch, of)| reference(c, at, branch, of));
}

fn reference(c: &mut Draft, at: &str, branch: &str, of: &str) {
    c.file(&format!("{at}/refs/heads/{branch}"), format!("{}\n", name(of)).as_bytes());
}

fn packed(heads: &[(&str, &str)]) -> String {
    heads.iter().map(|(branch, of)| format!("{} refs/heads/{branch}\n", name(of))).collect()
}

fn object(c: &mut Draft, at: &str, of: &str) {
    c.file(&loose(at, of), of.as_bytes());
}

fn loose(at: &str, of: &str) -> String {
    let name = name(of);
    format!("{at}/objects/{}/{}", &name[..2], &name[2..])
}

fn pack(c: &mut Draft, at: &str, number: &str, of: &[&str]) {
    let mut ids: Vec<[u8; 20]> = of.iter().map(|of| id(of)).collect();
    ids.sort_unstable();
    let mut index = b"\xfftOc\0\0\0\x02".to_vec();
    for first in 0..=255u8 {
        index.extend_from_slice(&(ids.iter().filter(|id| id[0] <= first).count() as u32).to_be_bytes());
    }
    ids.iter().for_each(|id| index.extend_from_slice(id));
    index.resize(index.len() + ids.len() * 8 + 40, 0);
    c.file(&format!("{at}/objects/pack/pack-{number}.pack"), of.join(" ").as_bytes());
    c.file(&format!("{at}/objects/pack/pack-{number}.idx"), &index);
}

fn remove_pack(c: &mut Draft, number: &str) {
    ["pack", "idx"].iter().for_each(|end| c.delete(&format!("repos/2/objects/pack/pack-{number}.{end}")));
}

fn id(of: &str) -> [u8; 20] {
    *blake3::hash(of.as_bytes()).as_bytes().first_chunk().expect("20 of 32 bytes")
}

fn name(of: &str) -> String {
    id(of).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A standby on a model disk, and the tree of its last changeset.
struct Copy {
    disk: ModelDisk,
    standby: Standby<ModelDisk>,
    tree: Expected,
    seq: Seq,
}

impl Copy {
    fn new() -> Copy {
        let disk = ModelDisk::durable();
        disk.make_dirs(HOME);
        let store = Store::open_in(ModelStore::default()).expect("a store");
        let setup = RootSetup { path: PathBuf::from(HOME), way: None, exclude: Exclude::new::<&str>([]).expect("no patterns") };
        let standby = Standby::open(disk.clone(), store, vec![setup]).expect("a standby");
        Copy { disk, standby, tree: Expected::default(), seq: Seq(0) }
    }

    fn delta(&mut self, make: impl FnOnce(&mut Draft)) -> Result<(), String> {
        self.apply(Baseline::Delta(self.seq), make)
    }

    fn apply(&mut self, baseline: Baseline, make: impl FnOnce(&mut Draft)) -> Result<(), String> {
        self.seq = self.seq.next();
        let mut draft = Draft::new(baseline, &self.tree, self.seq.0);
        make(&mut draft);
        let text = |e: coldspare_standby::StandbyError| e.to_string();
        self.standby.begin(SESSION, self.seq, baseline, self.seq).map_err(text)?;
        let ops = draft.stage(&self.standby, self.seq, draft.steps()).map_err(text)?;
        let (before, after) = (references(&files_of(&self.tree)), references(&files_of(&draft.expected)));
        let found = Arc::new(Mutex::new(Ok(())));
        let first = found.clone();
        self.disk.on_call(move |disk, call| {
            let mut first = first.lock().expect("no panic");
            if call.kind != CallKind::Looks && first.is_ok() {
                *first = read(&files_on(disk), &before, &after);
            }
        });
        let finished = self.standby.finish(self.seq, 1, Totals { ops, ..Totals::default() }).map_err(text);
        self.disk.leave_alone();
        let incomplete = finished?.incomplete;
        self.tree = draft.expected;
        if !incomplete.is_empty() {
            return Err(format!("changeset {}: {incomplete:?} is refused", self.seq));
        }
        if let Some(difference) = self.tree.difference(&self.disk, HOME.as_bytes()) {
            return Err(format!("after changeset {}: {difference}", self.seq));
        }
        let found = found.lock().expect("no panic").clone();
        found.map_err(|e| format!("G1 within changeset {}: {e}", self.seq))
    }
}

fn files_of(tree: &Expected) -> Files {
    let files = tree.all().filter(|(_, holds)| holds.entry.digest().is_some());
    files.map(|(path, holds)| (String::from_utf8_lossy(path).into_owned(), holds.content.clone())).collect()
}

fn files_on(disk: &ModelDisk) -> Files {
    let tree = disk.tree(HOME).expect("a root").into_iter();
    let files = tree.filter(|(path, seen)| seen.stat.kind == FileKind::File && !path.starts_with(b".coldspare/"));
    files.map(|(path, seen)| (String::from_utf8_lossy(&path).into_owned(), seen.content)).collect()
}

fn repositories(files: &Files) -> BTreeSet<String> {
    files.keys().filter_map(|path| path.strip_suffix("/HEAD").map(str::to_string)).collect()
}

/// References by repository and name.
fn references(files: &Files) -> References {
    let mut out = References::new();
    let text = |content: &[u8]| String::from_utf8_lossy(content).into_owned();
    for repository in repositories(files) {
        if let Some(packed) = files.get(&format!("{repository}/packed-refs")) {
            let lines = text(packed);
            out.extend(lines.lines().filter_map(|l| l.split_once(' ')).map(|(id, name)| (format!("{repository}/{name}"), id.to_string())));
        }
        let loose = format!("{repository}/refs/");
        let loose = files.iter().filter(|(path, _)| path.starts_with(&loose));
        out.extend(loose.map(|(path, content)| (path.clone(), text(content).trim_end().to_string())));
    }
    out
}

/// Reads every repository.
///
/// # Errors
/// What git would say of it.
fn read(files: &Files, before: &References, after: &References) -> Result<(), String> {
    let now = references(files);
    for (name, id) in &now {
        if ![before.get(name), after.get(name)].contains(&Some(id)) {
            return Err(format!("{name} is {id}, as it was neither before nor after"));
        }
    }
    for repository in repositories(files) {
        let within = format!("{repository}/");
        if let Some(name) = before.keys().filter(|n| n.starts_with(&within) && after.contains_key(*n)).find(|n| !now.contains_key(*n)) {
            return Err(format!("{name} is gone for a moment"));
        }
        let objects = objects(files, &repository)?;
        if let Some((name, id)) = now.iter().find(|(name, id)| name.starts_with(&within) && !objects.contains(*id)) {
            return Err(format!("{name} needs {id}, which is missing"));
        }
        derived(files, &repository)?;
    }
    Ok(())
}

/// The names of all objects of a repository, with those that it borrows.
fn objects(files: &Files, repository: &str) -> Result<BTreeSet<String>, String> {
    let mut out = BTreeSet::new();
    let within = format!("{repository}/objects/");
    for (path, content) in files.iter().filter(|(path, _)| path.starts_with(&within)) {
        let inside = &path[within.len()..];
        if let Some((dir, rest)) = inside.split_once('/').filter(|(dir, _)| dir.len() == 2) {
            out.insert(format!("{dir}{rest}"));
        } else if let Some(stem) = path.strip_suffix(".idx") {
            if !files.contains_key(&format!("{stem}.pack")) {
                return Err(format!("{path} has no pack"));
            }
            let count = content.get(8 + 255 * 4..8 + 256 * 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_be_bytes);
            let ids = content[8 + 256 * 4..].chunks_exact(20).take(count as usize);
            out.extend(ids.map(|id| id.iter().map(|byte| format!("{byte:02x}")).collect::<String>()));
        }
    }
    if let Some(content) = files.get(&format!("{within}info/alternates")) {
        let text = String::from_utf8_lossy(content).into_owned();
        let other = text.trim_end().strip_prefix("../../").and_then(|path| path.strip_suffix("/objects")).unwrap_or_default();
        let (above, _) = repository.rsplit_once('/').unwrap_or_default();
        out.extend(objects(files, &format!("{above}/{other}"))?);
    }
    Ok(out)
}

/// Whether all that derived files name is there; here a file of lines.
fn derived(files: &Files, repository: &str) -> Result<(), String> {
    let objects = format!("{repository}/objects");
    let lines = |name: &str| files.get(name).map(|content| String::from_utf8_lossy(content).into_owned()).unwrap_or_default();
    for pack in lines(&format!("{objects}/pack/multi-pack-index")).lines() {
        if let Some(end) = ["pack", "idx"].iter().find(|end| !files.contains_key(&format!("{objects}/pack/{pack}.{end}"))) {
            return Err(format!("the multi-pack index names {pack}, of which {end} is missing"));
        }
    }
    for layer in lines(&format!("{objects}/info/commit-graphs/commit-graph-chain")).lines() {
        if !files.contains_key(&format!("{objects}/info/commit-graphs/{layer}")) {
            return Err(format!("the chain of commit graphs names {layer}, which is missing"));
        }
    }
    Ok(())
}
