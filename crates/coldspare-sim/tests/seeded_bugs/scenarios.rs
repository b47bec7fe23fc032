//! One situation each, in which a promise would be broken: both ends on model disks, or the standby alone.

mod graphs;
mod indexes;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use coldspare_core::brakes::Limits;
use coldspare_core::changeset::{Ask, Have, Totals};
use coldspare_core::control::{ControlRecord, Event, Fresh, Proof, Session, step};
use coldspare_core::exclude::Exclude;
use coldspare_core::follow::{Effect as FollowEffect, Extent, Follow, FollowConfig, Input as Following, Sent};
use coldspare_core::intake::{Effect, End, Input, Intake};
use coldspare_core::{
    Baseline, Body, ClusterId, ContentRef, Digest, Entry, Epoch, Meta, NodeId, Op, RelPath, RootId, Seq, SessionId, Time,
};
use coldspare_delta::{Packed, unpack};
use coldspare_os::{Disk, FileKind};
use coldspare_scan::capture::{Capture, Certainty, Closed, Cycle, FilePart, Outlet, Root, Work};
use coldspare_scan::dirty::Hint;
use coldspare_scan::index::Index;
use coldspare_scan::watch::Watch;
use coldspare_sim::model::{CallKind, Fault, ModelDisk, ModelStore, Order, StoreImage};
use coldspare_standby::{Answer, RootSetup, Standby, StandbyError, Store};

pub(crate) use graphs::a_chain_comes_with_its_layers_or_not_at_all;
pub(crate) use indexes::a_damaged_index_makes_no_wrong_one;

const HOME: &str = "/home";
const CLUSTER: ClusterId = ClusterId([1; 16]);
const NODE: NodeId = NodeId([1; 16]);
const STANDBY: NodeId = NodeId([2; 16]);
const TIP: &str = "1111111111111111111111111111111111111111";
/// Above what the capture takes for too recent.
const SETTLED_MS: u64 = 40;

/// Both ends.
struct Both {
    active: ModelDisk,
    copy: ModelDisk,
    capture: Arc<Capture<ModelDisk>>,
    standby: Standby<ModelDisk>,
    session: SessionId,
}

type Contents = BTreeMap<String, Vec<u8>>;

impl Both {
    /// An active with these files, and a standby that has them.
    fn with(files: &[(&str, &[u8])]) -> Both {
        let (active, copy) = (ModelDisk::durable(), ModelDisk::durable());
        active.make_dirs(format!("{HOME}/.coldspare"));
        copy.make_dirs(HOME);
        let mut both = Both { capture: Arc::new(capture(&active)), standby: standby(&copy), active, copy, session: SessionId([1; 16]) };
        for (path, content) in files {
            both.write(path, content);
        }
        both.cycle(Work::Everything, Baseline::Full).unwrap();
        assert_eq!(both.there(), both.here());
        both
    }

    fn at(path: &str) -> String {
        format!("{HOME}/{path}")
    }

    fn write(&self, path: &str, content: &[u8]) {
        if let Some((dir, _)) = path.rsplit_once('/') {
            self.active.make_dirs(Both::at(dir));
        }
        self.active.write(Both::at(path), content).unwrap();
        self.active.advance_ms(SETTLED_MS);
    }

    fn here(&self) -> Contents {
        contents(&self.active)
    }

    fn there(&self) -> Contents {
        contents(&self.copy)
    }

    fn follow(&mut self) -> Result<(), String> {
        let from = self.standby.applied().expect("a changeset").seq;
        self.cycle(Work::Everything, Baseline::Delta(from))
    }

    fn follow_hints(&mut self) -> Result<(), String> {
        let from = self.standby.applied().expect("a changeset").seq;
        self.cycle(Work::Hinted, Baseline::Delta(from))
    }

    fn cycle(&mut self, work: Work, baseline: Baseline) -> Result<(), String> {
        let seq = self.standby.applied().map_or(Seq(1), |a| a.seq.next()).max(self.capture.index.next_seq().unwrap());
        self.cycle_as(seq, work, baseline)
    }

    fn cycle_as(&mut self, seq: Seq, work: Work, baseline: Baseline) -> Result<(), String> {
        self.standby.begin(self.session, seq, baseline, seq).map_err(|e| e.to_string())?;
        let certainty = if baseline == Baseline::Full { Certainty::Ask } else { Certainty::Sure };
        let cycle = Cycle { seq, baseline, certainty, work, literal: BTreeSet::new() };
        let direct = Direct { standby: &self.standby, seq, failure: Mutex::default() };
        let (_, report) = self.capture.run(cycle, &direct);
        let ended = match direct.failure.into_inner().unwrap() {
            Some(e) => Err(e.to_string()),
            None => report.map_err(|e| e.to_string()),
        };
        let finished = ended.and_then(|r| self.standby.finish(seq, r.as_of_ms, r.totals).map_err(|e| e.to_string()));
        match finished {
            Ok(_) => self.capture.index.record_acked(STANDBY, seq).unwrap(),
            Err(_) => self.standby.abandon().unwrap(),
        }
        finished.map(drop)
    }

    /// A changeset of what was hinted, the end of which never comes.
    fn cut_off(&mut self, seq: Seq) {
        let baseline = Baseline::Delta(self.standby.applied().expect("a changeset").seq);
        self.standby.begin(self.session, seq, baseline, seq).unwrap();
        let cycle = Cycle { seq, baseline, certainty: Certainty::Sure, work: Work::Hinted, literal: BTreeSet::new() };
        let (taken, report) = self.capture.run(cycle, &Direct { standby: &self.standby, seq, failure: Mutex::default() });
        assert!(report.unwrap().totals.ops > 0, "it has something");
        self.standby.abandon().unwrap();
        self.capture.watch.iter().for_each(|watch| watch.dirty().restore(taken.clone()));
    }

    /// The active follows on with a new session and an index that knows nothing.
    fn begin_a_session(&mut self) {
        self.session.0[0] += 1;
        self.capture = Arc::new(capture(&self.active));
    }

    /// From now on the capture is told of each change; it looked at everything, so that every folder is covered.
    fn watch(&mut self) {
        let watch = Watch::told(vec![PathBuf::from(HOME)], || ());
        watch.dirty().take();
        Arc::get_mut(&mut self.capture).expect("nobody else has it").watch = Some(watch);
        let capture = self.capture.clone();
        self.active.on_change(move |change| {
            let below = change.path.strip_prefix(HOME.as_bytes()).and_then(|below| below.strip_prefix(b"/"));
            if let (Some(watch), Some(Ok(path))) = (&capture.watch, below.map(RelPath::new)) {
                watch.tell(RootId(0), &path, Hint::Replaced, capture.disk.now_ms());
            }
        });
        self.follow().unwrap();
    }

    /// Whether something in the quarantine has this content.
    fn is_quarantined(&self, content: &[u8]) -> bool {
        let quarantine = self.copy.tree(format!("{HOME}/.coldspare/quarantine")).unwrap_or_default();
        quarantine.values().any(|seen| seen.content == content)
    }
}

fn capture(disk: &ModelDisk) -> Capture<ModelDisk> {
    let path = PathBuf::from(HOME);
    let root = Root { path: path.clone(), dir: disk.open_root(&path).unwrap(), exclude: Exclude::new::<&str>([]).unwrap() };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let index = Index::open_in(ModelStore::default()).unwrap();
    Capture::new(disk.clone(), vec![root], index, None, pool, 1)
}

fn standby(disk: &ModelDisk) -> Standby<ModelDisk> {
    Standby::open(disk.clone(), Store::open_in(ModelStore::default()).unwrap(), setup()).unwrap()
}

fn setup() -> Vec<RootSetup> {
    vec![RootSetup { path: PathBuf::from(HOME), way: None, exclude: Exclude::new::<&str>([]).unwrap() }]
}

fn contents(disk: &ModelDisk) -> Contents {
    let files = disk.tree(HOME).unwrap().into_iter().filter(|(p, seen)| seen.stat.kind == FileKind::File && !p.starts_with(b".coldspare"));
    files.map(|(path, seen)| (String::from_utf8_lossy(&path).into_owned(), seen.content)).collect()
}

/// Hands everything straight to the standby.
struct Direct<'a> {
    standby: &'a Standby<ModelDisk>,
    seq: Seq,
    failure: Mutex<Option<StandbyError>>,
}

impl Direct<'_> {
    fn pass<T>(&self, result: Result<T, StandbyError>) -> Result<T, Closed> {
        result.map_err(|e| {
            self.failure.lock().unwrap().get_or_insert(e);
            Closed
        })
    }
}

fn raw(packed: Packed, raw_len: usize) -> Vec<u8> {
    match packed {
        Packed::Raw(bytes) => bytes,
        Packed::Zstd(bytes) => unpack(&bytes, raw_len).unwrap(),
    }
}

impl Outlet for Direct<'_> {
    fn batch(&self, ops: Vec<Op>, payload: Packed, raw_len: usize) -> Result<(), Closed> {
        self.pass(self.standby.stage_batch(self.seq, ops, &raw(payload, raw_len)))
    }

    fn segment(&self, p: FilePart, literal: Packed, raw_len: usize) -> Result<(), Closed> {
        self.pass(self.standby.stage_segment(self.seq, &p, &raw(literal, raw_len)))
    }

    fn ask(&self, items: Vec<Ask>) -> Result<Vec<Have>, Closed> {
        self.pass(self.standby.have(&items))
    }
}

/// Fails with `what` unless `holds`.
fn holds(holds: bool, what: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what.into()) }
}

const REPOSITORY: [(&str, &[u8]); 3] =
    [("repo/HEAD", b"ref: refs/heads/main\n"), ("repo/refs/heads/main", b""), ("repo/objects/info/packs", b"\n")];

/// A home with a repository, its reference and a pack.
fn with_repository() -> Both {
    let tip = format!("{TIP}\n");
    let mut files: Vec<(&str, &[u8])> = REPOSITORY.to_vec();
    files[1].1 = tip.as_bytes();
    let pack = pack(0);
    let object = loose_object();
    let path = format!("repo/objects/{}/{}", &object.0[..2], &object.0[2..]);
    let id = format!("{}\n", object.0);
    files[1].1 = id.as_bytes();
    files.push((&path, &object.1));
    files.push(("repo/objects/pack/pack-1.pack", &pack));
    Both::with(&files)
}

fn loose_object() -> (String, Vec<u8>) {
    blob("hello")
}

/// The name of a blob and its loose object.
fn blob(content: &str) -> (String, Vec<u8>) {
    use sha1::Digest as _;
    use std::io::Write as _;
    let plain = format!("blob {}\0{content}", content.len()).into_bytes();
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(&plain).unwrap();
    let name = sha1::Sha1::digest(&plain).iter().map(|byte| format!("{byte:02x}")).collect();
    (name, encoder.finish().unwrap())
}

/// A pack by its head and length; what is in it nobody looks at.
fn pack(inner: u8) -> Vec<u8> {
    [b"PACK\0\0\0\x02\0\0\0\x01".as_slice(), &[inner; 40], &[7; 20]].concat()
}

/// Damages a file on the active; the standby has to keep the good one.
fn stays_good(path: &str, damage: &[u8]) -> Result<(), String> {
    let mut both = with_repository();
    let good = both.there();
    assert_ne!(good[path], damage);
    both.write(path, damage);
    both.follow()?;
    holds(both.there() == good, &format!("G2: {path} was replaced by what is damaged"))
}

pub(crate) fn an_empty_reference_does_not_replace_a_good_one() -> Result<(), String> {
    stays_good("repo/refs/heads/main", b"")
}

pub(crate) fn a_damaged_object_does_not_replace_a_good_one() -> Result<(), String> {
    let (name, _) = loose_object();
    stays_good(&format!("repo/objects/{}/{}", &name[..2], &name[2..]), b"")
}

pub(crate) fn a_changed_pack_does_not_replace_the_good_one() -> Result<(), String> {
    stays_good("repo/objects/pack/pack-1.pack", &pack(1))
}

pub(crate) fn a_reference_to_nothing_is_not_committed() -> Result<(), String> {
    let mut both = with_repository();
    both.write("repo/refs/heads/topic", format!("{TIP}\n").as_bytes());
    both.follow()?;
    holds(!both.there().contains_key("repo/refs/heads/topic"), "G2: a reference without its object is on the standby")
}

/// What a changeset left out may be what the next one, captured before anybody knew, builds on.
pub(crate) fn what_follows_on_something_left_out_is_refused() -> Result<(), String> {
    let mut both = with_repository();
    let before = both.standby.applied().unwrap().seq;
    both.write_reference("repo", "topic", "an object that isn't there");
    both.follow()?;
    let last = both.standby.applied().unwrap().seq;
    let (unaware, aware) = (
        both.standby.begin(both.session, last.next(), Baseline::Delta(last), before).is_err(),
        both.standby.begin(both.session, last.next(), Baseline::Delta(last), last).is_ok(),
    );
    holds(unaware, "G2: a changeset is taken that builds on what was left out")?;
    holds(aware, "one that knows is taken")
}

/// A folder is renamed while an earlier change is captured and not acknowledged.
pub(crate) fn a_rename_leaves_nothing_behind() -> Result<(), String> {
    let mut both = Both::with(&[("folder/file", b"1"), ("other", b"old")]);
    both.watch();
    let last = both.standby.applied().unwrap().seq;
    both.write("other", b"new");
    both.cut_off(last.next());
    both.active.move_to(Both::at("folder"), Both::at("moved")).unwrap();
    both.active.advance_ms(SETTLED_MS);
    both.cycle_as(Seq(last.0 + 2), Work::Hinted, Baseline::Delta(last))?;
    both.cycle_as(Seq(last.0 + 3), Work::Hinted, Baseline::Delta(Seq(last.0 + 2)))?;
    holds(both.there() == both.here(), "G3: a change is counted as acknowledged that was not sent")?;
    // And one that owes nothing is a rename.
    let old = both.copy.tree(Both::at("moved")).unwrap()[b"file".as_slice()].stat.ino;
    both.active.move_to(Both::at("moved"), Both::at("again")).unwrap();
    both.cycle_as(Seq(last.0 + 4), Work::Hinted, Baseline::Delta(Seq(last.0 + 3)))?;
    both.cycle_as(Seq(last.0 + 5), Work::Hinted, Baseline::Delta(Seq(last.0 + 4)))?;
    let new = both.copy.tree(Both::at("again")).unwrap()[b"file".as_slice()].stat.ino;
    holds(old == new && both.there() == both.here(), "the folder was renamed")
}

pub(crate) fn an_object_that_a_reference_needs_does_not_go() -> Result<(), String> {
    let mut both = with_repository();
    let object = both.write_blob("repo", "needed");
    both.write_reference("repo", "topic", "needed");
    both.follow()?;
    holds(both.there().contains_key(object.as_str()), "the object came")?;
    both.active.remove(Both::at(&object)).unwrap();
    both.follow()?;
    holds(both.there().contains_key(object.as_str()), "G2: a reference lost its object on the standby")
}

impl Both {
    fn write_blob(&self, repository: &str, content: &str) -> String {
        let (name, file) = blob(content);
        let path = format!("{repository}/objects/{}/{}", &name[..2], &name[2..]);
        self.write(&path, &file);
        path
    }

    fn write_reference(&self, repository: &str, branch: &str, content: &str) {
        self.write(&format!("{repository}/refs/heads/{branch}"), format!("{}\n", blob(content).0).as_bytes());
    }

    /// One cycle, at call `at` of which somebody writes; says whether it had so many.
    fn follow_while(&mut self, work: Work, at: u64, write: impl Fn(&ModelDisk) + Send + Sync + 'static) -> Result<bool, String> {
        let calls = self.active.calls();
        self.active.on_call(move |disk, call| {
            if call.number == calls + at {
                write(disk);
            }
        });
        let ended = if work == Work::Hinted { self.follow_hints() } else { self.follow() };
        self.active.leave_alone();
        ended.map(|()| self.active.calls() > calls + at)
    }
}

const TIP_CONTENT: &str = "tip";
const INNER_CONTENT: &str = "what the tip needs";
const PRUNED: &str = "repo/refs/heads/topic";

/// A branch goes and an object that only it needed, at each call of a capture.
fn while_git_prunes(begin: impl Fn(&mut Both), is_known: bool, work: Work) -> Result<(), String> {
    for at in 0.. {
        let mut both = with_repository();
        begin(&mut both);
        let (tip, inner) = (both.write_blob("repo", TIP_CONTENT), both.write_blob("repo", INNER_CONTENT));
        both.write_reference("repo", "topic", TIP_CONTENT);
        if is_known {
            both.follow()?;
        }
        both.write("other", b"something else");
        let pruned = inner.clone();
        let is_within = both.follow_while(work, at, move |disk| {
            disk.remove(Both::at(PRUNED)).unwrap();
            disk.remove(Both::at(&pruned)).unwrap();
            disk.advance_ms(1);
        })?;
        let there = both.there();
        let is_whole = !there.contains_key(PRUNED) || (there.contains_key(&tip) && there.contains_key(&inner));
        holds(is_whole, &format!("G2: pruned at call {at}: a branch is there without what it needs"))?;
        if !is_within {
            return holds(there.contains_key(PRUNED), "nothing was pruned, and the branch did not come");
        }
    }
    Ok(())
}

/// git takes an object that only the references need into a pack and removes it, at each call of a capture.
pub(crate) fn objects_may_move_to_a_pack_before_they_are_seen() -> Result<(), String> {
    const PACK: &str = "repo/objects/pack/pack-2.pack";
    for begin in [Both::watch, watched] {
        for at in 0.. {
            let mut both = with_repository();
            begin(&mut both);
            let (tip, inner) = (both.write_blob("repo", TIP_CONTENT), both.write_blob("repo", INNER_CONTENT));
            both.write_reference("repo", "topic", TIP_CONTENT);
            let packed = inner.clone();
            let is_within = both.follow_while(Work::Hinted, at, move |disk| {
                disk.write(Both::at(PACK), &pack(2)).unwrap();
                disk.remove(Both::at(&packed)).unwrap();
                disk.advance_ms(1);
            })?;
            let there = both.there();
            let has_inner = there.contains_key(&inner) || there.contains_key(PACK);
            let is_whole = !there.contains_key("repo/refs/heads/topic") || (there.contains_key(&tip) && has_inner);
            holds(is_whole, &format!("G2: packed at call {at}: a branch is there without what it needs"))?;
            if !is_within {
                break;
            }
        }
    }
    Ok(())
}

/// Every folder of objects is watched, so that whatever goes from it is known.
fn watched(both: &mut Both) {
    for content in [TIP_CONTENT, INNER_CONTENT] {
        both.active.make_dirs(Both::at(&format!("repo/objects/{}", &blob(content).0[..2])));
    }
    both.watch();
}

pub(crate) fn objects_may_go_before_they_are_read() -> Result<(), String> {
    while_git_prunes(watched, false, Work::Hinted)
}

pub(crate) fn objects_may_go_before_they_are_seen() -> Result<(), String> {
    while_git_prunes(watched, false, Work::Everything)
}

pub(crate) fn objects_may_go_that_the_standby_has() -> Result<(), String> {
    while_git_prunes(|_| (), true, Work::Everything)
}

/// git appends to a reference's log, and writes a work tree's `HEAD` and its index, behind the objects that they name.
pub(crate) fn objects_come_with_whatever_names_them() -> Result<(), String> {
    const MENTIONS: [&str; 4] = ["logs/refs/heads/main", "worktrees/w/HEAD", "worktrees/w/index", "index"];
    for work in [Work::Everything, Work::Hinted] {
        for at in 0.. {
            let mut both = with_repository();
            MENTIONS.iter().for_each(|name| both.write(&format!("repo/{name}"), b"old\n"));
            let (name, object) = blob(INNER_CONTENT);
            let path = format!("repo/objects/{}/{}", &name[..2], &name[2..]);
            both.active.make_dirs(Both::at(&format!("repo/objects/{}", &name[..2])));
            both.watch();
            both.follow()?;
            both.write("other", b"something else");
            let (at_path, told) = (path.clone(), name.clone());
            let is_within = both.follow_while(work, at, move |disk| {
                disk.write(Both::at(&at_path), &object).unwrap();
                MENTIONS.iter().for_each(|name| disk.write(Both::at(&format!("repo/{name}")), told.as_bytes()).unwrap());
                disk.advance_ms(1);
            })?;
            let there = both.there();
            for mention in MENTIONS {
                let names_it = there.get(format!("repo/{mention}").as_str()).is_some_and(|content| content.starts_with(name.as_bytes()));
                holds(
                    !names_it || there.contains_key(path.as_str()),
                    &format!("G2: written at call {at}: {mention} names what isn't there"),
                )?;
            }
            if !is_within {
                break;
            }
        }
    }
    Ok(())
}

/// A fork that can't be had stays with what it borrows.
pub(crate) fn a_family_stays_together() -> Result<(), String> {
    let mut both = with_repository();
    let borrowed = both.write_blob("repo", "borrowed");
    both.write("fork/objects/info/alternates", b"../../repo/objects\n");
    both.write_reference("fork", "main", "borrowed");
    both.write("fork/HEAD", b"ref: refs/heads/main\n");
    both.follow()?;
    assert_eq!(both.there(), both.here());
    // The fork's branch moves on to what is damaged; then the parent collects what the fork had borrowed.
    let damaged = both.write_blob("fork", "damaged");
    both.write(&damaged, b"");
    both.write_reference("fork", "main", "damaged");
    both.active.remove(Both::at(&borrowed)).unwrap();
    both.follow()?;
    let there = both.there();
    let is_still = there["fork/refs/heads/main"] == format!("{}\n", blob("borrowed").0).as_bytes();
    holds(is_still && there.contains_key(&borrowed), "G2: a fork is there without what it borrows")
}

/// A parent is held back, and then its fork moves on to what came to the parent meanwhile.
pub(crate) fn a_fork_waits_for_a_parent_that_is_held_back() -> Result<(), String> {
    let mut both = with_repository();
    both.write("fork/objects/info/alternates", b"../../repo/objects\n");
    both.write_reference("fork", "main", INNER_CONTENT);
    both.write("fork/HEAD", b"ref: refs/heads/main\n");
    both.write_blob("repo", INNER_CONTENT);
    both.follow()?;
    assert_eq!(both.there(), both.here());
    both.watch();
    let meanwhile = both.write_blob("repo", "came to the parent");
    let damaged = both.write_blob("repo", "damaged");
    let good = both.here()[&damaged].clone();
    both.write(&damaged, b"");
    both.follow_hints()?;
    let own = both.write_blob("fork", "of the fork, and needs what came to its parent");
    both.write_reference("fork", "main", "of the fork, and needs what came to its parent");
    both.follow_hints()?;
    let there = both.there();
    holds(there.contains_key(&meanwhile) || !there.contains_key(&own), "G2: a fork is there without what it borrows")?;
    // Once it is mended all of it comes.
    both.write(&damaged, &good);
    for _ in 0..3 {
        both.follow_hints()?;
    }
    holds(both.there() == both.here(), "liveness: a fork stays held back though its parent no longer is")
}

/// A file of several windows is rewritten at each call of a capture.
pub(crate) fn a_file_that_is_rewritten_is_never_torn() -> Result<(), String> {
    const BYTES: usize = 5 << 20;
    for at in 0.. {
        let mut both = Both::with(&[("other", b"content")]);
        both.write("large", &vec![1; BYTES]);
        let is_within = both.follow_while(Work::Everything, at, |disk| disk.write_part(Both::at("large"), 0, &vec![2; BYTES]).unwrap())?;
        let is_torn = both.there().get("large").is_some_and(|content| content.iter().any(|byte| *byte != content[0]));
        holds(!is_torn, &format!("G2: rewritten at call {at}, the file is torn"))?;
        if !is_within {
            return Ok(());
        }
    }
    Ok(())
}

pub(crate) fn what_changed_within_a_clock_tick_is_read_again() -> Result<(), String> {
    let mut both = Both::with(&[("file", b"old")]);
    both.active.write(Both::at("file"), b"one").unwrap();
    both.follow()?;
    both.active.write(Both::at("file"), b"two").unwrap();
    both.follow()?;
    holds(both.there() == both.here(), "G2: the standby is behind, and nothing says so")
}

pub(crate) fn an_unmounted_root_is_no_deletion() -> Result<(), String> {
    let mut both = Both::with(&[("precious", b"content")]);
    both.active.remove(Both::at("precious")).unwrap();
    both.active.remove(Both::at(".coldspare")).unwrap();
    let _refused = both.follow();
    holds(both.there().contains_key("precious"), "G5: a root without its marker was captured")
}

pub(crate) fn a_root_is_not_emptied_unasked() -> Result<(), String> {
    let mut both = Both::with(&[("precious", b"content")]);
    both.standby = both.standby.with_brakes(Limits::default());
    both.active.remove(Both::at("precious")).unwrap();
    let held = both.follow();
    holds(held.is_err() && both.there().contains_key("precious"), "G5: a root was emptied and nobody asked")?;
    both.standby.answer(Answer::Rejected).unwrap().expect("a question");
    let held = both.follow();
    holds(held.is_err() && both.there().contains_key("precious"), "G5: a root was emptied that was not to be")?;
    both.standby.answer(Answer::Accepted).unwrap().expect("a question");
    both.follow()?;
    holds(both.there() == both.here() && both.standby.question().unwrap().is_none(), "G5: what was accepted did not come")
}

pub(crate) fn what_cannot_be_read_is_not_gone() -> Result<(), String> {
    let mut both = Both::with(&[("dir/file", b"content"), ("dir/other", b"content")]);
    both.watch();
    let watch = both.capture.watch.as_ref().expect("a watch");
    assert!(watch.tell(RootId(0), &RelPath::new(&b"dir/file"[..]).unwrap(), Hint::Changed, 0));
    both.active.fail(Fault { on: |call| call.name == "stat", after: 0, times: u64::MAX, errno: 5 });
    both.follow_hints()?;
    both.active.leave_alone();
    holds(both.there().contains_key("dir/file"), "G5: a file that can't be read was removed")
}

pub(crate) fn what_is_of_somebody_else_goes_to_quarantine() -> Result<(), String> {
    let mut both = Both::with(&[("file", b"content"), ("gone", b"content"), ("folder", b"content"), ("empty/file", b"content")]);
    for path in ["file", "gone", "folder"] {
        both.copy.remove(Both::at(path)).unwrap();
    }
    both.active.remove(Both::at("empty/file")).unwrap();
    both.follow()?;
    both.copy.remove(Both::at("empty")).unwrap();
    both.copy.make_dirs(Both::at("folder"));
    // A file for a file, in a folder where a file was, and for a folder.
    for (path, content) in [("file", "file"), ("gone", "gone"), ("folder/inner", "folder"), ("empty", "empty")] {
        both.copy.write(Both::at(path), format!("of somebody else: {content}").as_bytes()).unwrap();
    }
    for path in ["gone", "folder", "empty"] {
        both.active.remove(Both::at(path)).unwrap();
    }
    both.write("file", b"changed");
    both.follow()?;
    let are_kept =
        ["file", "gone", "folder", "empty"].iter().all(|path| both.is_quarantined(format!("of somebody else: {path}").as_bytes()));
    holds(both.there() == both.here() && are_kept, "G5: what coldspare did not put there is gone")
}

pub(crate) fn what_a_new_session_takes_away_is_kept() -> Result<(), String> {
    let mut both = Both::with(&[("file", b"content"), ("replaced", b"older")]);
    both.active.remove(Both::at("file")).unwrap();
    both.write("replaced", b"newer");
    both.begin_a_session();
    both.cycle(Work::Everything, Baseline::Full)?;
    let are_kept = both.is_quarantined(b"content") && both.is_quarantined(b"older");
    holds(both.there() == both.here() && are_kept, "G5: what the standby had beyond the active is gone")
}

/// The first changeset of a session leaves a repository as it is; what leaves that later is divergence as well.
pub(crate) fn what_a_new_session_takes_away_later_is_kept() -> Result<(), String> {
    let mut both = with_repository();
    both.write_blob("repo", TIP_CONTENT);
    both.write_reference("repo", "topic", TIP_CONTENT);
    both.follow()?;
    let lost = both.here()["repo/refs/heads/topic"].clone();
    both.active.remove(Both::at("repo/refs/heads/topic")).unwrap();
    let main = both.here()["repo/refs/heads/main"].clone();
    both.write("repo/refs/heads/main", b"");
    both.session.0[0] += 1; // of the same host, which knows what it had sent
    both.cycle(Work::Everything, Baseline::Full)?;
    holds(both.there().contains_key("repo/refs/heads/topic"), "the repository was not left as it was")?;
    both.write("repo/refs/heads/main", &main);
    both.follow()?;
    holds(both.there() == both.here(), "the repository did not come once it was mended")?;
    holds(both.is_quarantined(&lost), "G5: a reference that only the standby had is gone")
}

/// Events are lost before a cycle that follows hints: it brings nothing, and says so.
pub(crate) fn a_cycle_that_lost_events_is_no_whole_one() -> Result<(), String> {
    let mut both = Both::with(&[("file", b"content")]);
    both.watch();
    both.write("file", b"changed");
    both.capture.watch.as_ref().expect("a watch").dirty().add_everything(0);
    let seq = both.capture.index.next_seq().unwrap();
    let baseline = Baseline::Delta(both.standby.applied().expect("a changeset").seq);
    let cycle = Cycle { seq, baseline, certainty: Certainty::Sure, work: Work::Hinted, literal: BTreeSet::new() };
    let direct = Direct { standby: &both.standby, seq, failure: Mutex::default() };
    let (_, report) = both.capture.run(cycle, &direct);
    holds(report.map_err(|e| e.to_string())?.is_left, "G3: a cycle that looked at nothing counts as whole")
}

/// The host lost its power, and with it what was not synced; the standby has it.
pub(crate) fn what_a_power_loss_took_is_kept() -> Result<(), String> {
    let mut both = Both::with(&[("file", b"content"), ("lost", b"pushed, not synced")]);
    both.active.remove(Both::at("lost")).unwrap();
    let session = Session { epoch: Epoch(1), id: both.session, opened_by: NODE };
    let active = ControlRecord::active(CLUSTER, NODE, session.epoch, session.id, [1; 16]);
    let fresh = Fresh { id: SessionId([2; 16]), boot: [2; 16] };
    let (started, _) = step(&active, Event::Started(fresh)).map_err(|e| e.to_string())?;
    if started.session() == Some(session) {
        both.follow()?;
    } else {
        both.begin_a_session();
        both.cycle(Work::Everything, Baseline::Full)?;
    }
    holds(both.there() == both.here() && both.is_quarantined(b"pushed, not synced"), "G5: what only the standby had is gone")
}

/// The power goes at any call while the first changeset of a session is committed and applied.
pub(crate) fn what_a_new_session_takes_away_survives_a_power_loss() -> Result<(), String> {
    let disk = ModelDisk::new();
    disk.make_dirs(HOME);
    let store = ModelStore::default();
    let standby = Standby::open(disk.clone(), Store::open_in(store.clone()).unwrap(), setup()).unwrap();
    let apply = |session: u8, seq: u64, files: &[&str], content: &[u8]| {
        standby.begin(SessionId([session; 16]), Seq(seq), Baseline::Full, Seq(seq)).unwrap();
        files.iter().for_each(|path| standby.stage_batch(Seq(seq), vec![put(path, content)], content).unwrap());
        standby.finish(Seq(seq), 1, Totals { ops: files.len() as u64, ..Totals::default() }).unwrap();
    };
    apply(1, 1, &["file", "replaced"], b"only here");
    disk.settle();
    let points = Arc::new(Mutex::new(Vec::new()));
    let (taken, image) = (points.clone(), store.clone());
    disk.on_call(move |disk, call| {
        if call.kind != CallKind::Looks {
            taken.lock().unwrap().push((disk.crash_point(), image.durable()));
        }
    });
    apply(2, 2, &["replaced"], b"newer");
    disk.leave_alone();
    let mut result = Ok(());
    for (number, (files, store)) in points.lock().unwrap().iter().enumerate() {
        for order in [Order::Journal, Order::Any] {
            files.for_each(order, 100, number as u64, &mut |crashed| {
                let judged = is_kept(&crashed.disk(), store);
                if let (Ok(()), Err(e)) = (&result, judged) {
                    result = Err(format!("G5: at call {number}, {order:?}: {e}"));
                }
            });
        }
    }
    result
}

fn is_kept(disk: &ModelDisk, store: &StoreImage) -> Result<(), String> {
    let opened = Standby::open(disk.clone(), Store::open_in(ModelStore::of(store.clone())).unwrap(), setup());
    if opened.map_err(|e| e.to_string())?.applied().is_none_or(|applied| applied.seq != Seq(2)) {
        return Ok(());
    }
    let kept = disk.tree(format!("{HOME}/.coldspare/quarantine")).unwrap_or_default();
    let files = kept.values().filter(|seen| seen.content == b"only here").count();
    let list = kept.iter().find(|(path, _)| path.ends_with(b"LIST")).map(|(_, seen)| seen.content.clone()).unwrap_or_default();
    let lines = list.iter().filter(|byte| **byte == b'\n').count();
    holds((files, lines) == (2, 2), &format!("the quarantine has {files} of 2 files, and {lines} of 2 lines of the list"))
}

/// A changeset is applied only once all frames that its end counted are staged.
pub(crate) fn an_end_waits_for_its_frames() -> Result<(), String> {
    let mut intake = Intake::<()>::new();
    intake.handle(Input::Begin { seq: Seq(1), baseline: Baseline::Full, acked: Seq(0) });
    while intake.poll_effect().is_some() {}
    intake.handle(Input::Begun(Ok(())));
    intake.handle(Input::End(End { seq: Seq(1), as_of_ms: 1, batches: 1, segments: 0, totals: Totals::default() }));
    let is_early = std::iter::from_fn(|| intake.poll_effect()).any(|effect| matches!(effect, Effect::Finish(_)));
    holds(!is_early, "G3: a changeset is applied before its frames are staged")
}

/// What an active does that meets a standby without anything, by these inputs.
fn followed(inputs: impl IntoIterator<Item = Following>) -> Vec<FollowEffect> {
    let config = FollowConfig {
        session: SessionId([1; 16]),
        next_seq: Seq(1),
        acked: None,
        full_scan_every: Duration::from_secs(600),
        retry_min: Duration::from_millis(200),
        retry_max: Duration::from_secs(5),
    };
    let mut machine = Follow::new(config, Duration::ZERO);
    let mut effects = Vec::new();
    for input in inputs {
        machine.handle(Duration::ZERO, input);
        effects.extend(std::iter::from_fn(|| machine.poll_effect()));
    }
    effects
}

/// Both trees are compared while none of them changes.
pub(crate) fn nothing_is_compared_while_a_changeset_is_under_way() -> Result<(), String> {
    let before = [
        Following::Tick,
        Following::Opened { applied: None },
        Following::Captured { sent: Sent::Changeset, extent: Extent::All },
        Following::Acked { seq: Seq(1) },
        Following::Hints,
        Following::Compare,
    ];
    let is_compared = |effects: &[FollowEffect]| effects.iter().any(|effect| matches!(effect, FollowEffect::Compare { .. }));
    holds(!is_compared(&followed(before.clone())), "G7: the trees are compared while a changeset is under way")?;
    let after = [Following::Captured { sent: Sent::Changeset, extent: Extent::All }, Following::Acked { seq: Seq(2) }];
    assert!(is_compared(&followed(before.into_iter().chain(after))), "they are compared once it is applied");
    Ok(())
}

/// A checkpoint is not confirmed by a cycle that left something to the next.
pub(crate) fn a_checkpoint_waits_for_what_is_left() -> Result<(), String> {
    let effects = followed([
        Following::Tick,
        Following::Checkpoint { id: 7 },
        Following::Opened { applied: None },
        Following::Captured { sent: Sent::Changeset, extent: Extent::Part },
        Following::Acked { seq: Seq(1) },
    ]);
    assert!(effects.contains(&FollowEffect::RecordAcked { seq: Seq(1) }), "{effects:?}");
    let is_early = effects.iter().any(|effect| matches!(effect, FollowEffect::Confirm { .. }));
    holds(!is_early, "G3: a checkpoint is confirmed, and something is left to the next cycle")
}

pub(crate) fn a_damaged_base_is_noticed() -> Result<(), String> {
    let content: Vec<u8> = (0..600_000u32).flat_map(|n| (n.wrapping_mul(2_654_435_761)).to_be_bytes()).collect();
    let mut both = Both::with(&[("large", &content)]);
    both.copy.write_part(Both::at("large"), 1_000_000, b"rotten").unwrap();
    both.write("large", &[b"!", &content[..]].concat());
    if both.follow().is_ok() {
        holds(both.there() == both.here(), "G2: content without its digest is committed")?;
    }
    Ok(())
}

/// One operation with inline content.
fn put(path: &str, promised: &[u8]) -> Op {
    let meta = Meta { mode: 0o644, uid: 0, gid: 0, mtime: Time { secs: 1, nanos: 0 }, xattrs: Vec::new() };
    let body = Body::File { size: promised.len() as u64, digest: Digest(coldspare_delta::digest(promised)), sparse: false };
    Op::Put { root: RootId(0), path: RelPath::new(path.as_bytes()).unwrap(), entry: Entry { meta, body }, content: ContentRef::Inline }
}

/// Hands one file to the standby as changeset `seq`.
fn hand_over(both: &Both, seq: Seq, baseline: Baseline, promised: &[u8], content: &[u8]) -> Result<(), String> {
    hand_over_at("file", both, seq, baseline, promised, content)
}

fn hand_over_at(path: &str, both: &Both, seq: Seq, baseline: Baseline, promised: &[u8], content: &[u8]) -> Result<(), String> {
    let text = |e: StandbyError| e.to_string();
    both.standby.begin(both.session, seq, baseline, seq).map_err(text)?;
    both.standby.stage_batch(seq, vec![put(path, promised)], content).map_err(text)?;
    both.standby.finish(seq, 1, Totals { ops: 1, ..Totals::default() }).map(drop).map_err(text)
}

pub(crate) fn content_without_its_digest_is_refused() -> Result<(), String> {
    let both = Both::with(&[("file", b"content")]);
    let last = both.standby.applied().unwrap().seq;
    let _refused = hand_over(&both, last.next(), Baseline::Delta(last), b"promised", b"PROMISED");
    holds(both.there() == both.here(), "G2: content without its digest is committed")
}

pub(crate) fn nothing_comes_without_its_folder() -> Result<(), String> {
    let both = Both::with(&[("file", b"content")]);
    let last = both.standby.applied().unwrap().seq;
    let outcome = hand_over_at("folder/deep/file", &both, last.next(), Baseline::Delta(last), b"new", b"new");
    holds(outcome.is_err() && both.there() == both.here(), "G1: a file is applied in a folder of which nothing was said")
}

pub(crate) fn an_older_changeset_is_refused() -> Result<(), String> {
    let mut both = Both::with(&[("file", b"old")]);
    let first = both.standby.applied().unwrap().seq;
    both.write("file", b"new");
    both.follow()?;
    let last = both.standby.applied().unwrap().seq;
    for (seq, baseline) in [(last, Baseline::Delta(first)), (last.next(), Baseline::Delta(first)), (first, Baseline::Full)] {
        let _refused = hand_over(&both, seq, baseline, b"late", b"late");
        holds(both.there() == both.here(), &format!("G4: {seq} on {baseline:?} was applied after {last}"))?;
        both.standby.abandon().unwrap();
    }
    Ok(())
}

pub(crate) fn a_standby_without_room_refuses_before_it_commits() -> Result<(), String> {
    let both = Both::with(&[("file", b"content")]);
    let (_, inodes) = both.copy.used();
    both.copy.set_room(1 << 30, inodes + 100);
    let last = both.standby.applied().unwrap().seq;
    let refused = hand_over(&both, last.next(), Baseline::Delta(last), b"new", b"new");
    holds(refused.is_err() && both.there() == both.here(), "G8: a changeset was taken with less room than is kept free")
}

/// A sync fails once; the disk never gets what it was to write, though later syncs succeed.
pub(crate) fn what_a_failed_sync_was_to_write_is_never_acknowledged() -> Result<(), String> {
    let disk = ModelDisk::new();
    disk.make_dirs(HOME);
    disk.settle();
    let store = ModelStore::default();
    let standby = Standby::open(disk.clone(), Store::open_in(store.clone()).unwrap(), setup()).unwrap();
    let session = SessionId([1; 16]);
    disk.fail(Fault { on: |call| call.kind == CallKind::Syncs, after: 0, times: 1, errno: 5 });
    let text = |e: StandbyError| e.to_string();
    let finish = |seq: Seq, content: ContentRef| {
        standby.begin(session, seq, Baseline::Full, seq).map_err(text)?;
        let Op::Put { root, path, entry, .. } = put("file", b"content") else { unreachable!("a put") };
        let inline = if content == ContentRef::Inline { &b"content"[..] } else { b"" };
        standby.stage_batch(seq, vec![Op::Put { root, path, entry, content }], inline).map_err(text)?;
        standby.finish(seq, 1, Totals { ops: 1, ..Totals::default() }).map_err(text)
    };
    finish(Seq(1), ContentRef::Inline).expect_err("a sync that fails");
    let _kept = standby.abandon();
    if finish(Seq(2), ContentRef::Staged).is_err() {
        return Ok(());
    }
    // The power goes.
    drop(standby);
    let after = disk.crash(&mut coldspare_sim::Chance::new(1));
    let reopened = Standby::open(after.clone(), Store::open_in(ModelStore::of(store.durable())).unwrap(), setup());
    let content = contents(&after).remove("file");
    holds(
        reopened.is_ok() && content.as_deref() == Some(b"content"),
        "G3: what was acknowledged after a failed sync did not survive the loss of power",
    )
}

pub(crate) fn a_lower_epoch_is_refused() -> Result<(), String> {
    let session = |epoch| Session { epoch: Epoch(epoch), id: SessionId([epoch as u8; 16]), opened_by: NODE };
    let hello = |epoch| Event::Hello { cluster: CLUSTER, session: session(epoch) };
    let (record, _) = step(&ControlRecord::standby(CLUSTER, STANDBY), hello(3)).map_err(|e| e.to_string())?;
    holds(step(&record, hello(2)).is_err(), "G4: an active of a lower epoch is served")
}

/// Both hosts opened an epoch: neither is served, and an active that meets the other stops.
pub(crate) fn two_openers_of_one_epoch_stop_each_other() -> Result<(), String> {
    let session = |opened_by, id| Session { epoch: Epoch(2), id: SessionId([id; 16]), opened_by };
    let active = ControlRecord::active(CLUSTER, NODE, Epoch(2), SessionId([1; 16]), [1; 16]);
    let rival = Event::Hello { cluster: CLUSTER, session: session(STANDBY, 2) };
    let met = step(&active, rival.clone()).map_err(|e| e.to_string());
    let is_stopped = met.is_ok_and(|(record, _)| record.role == coldspare_core::control::Role::Fenced);
    let hello = Event::Hello { cluster: CLUSTER, session: session(NODE, 1) };
    let (follower, _) = step(&ControlRecord::standby(CLUSTER, NodeId([9; 16])), hello).map_err(|e| e.to_string())?;
    holds(is_stopped && step(&follower, rival).is_err(), "R3: two openers of one epoch are both served")
}

/// Of two hosts that opened an epoch the one that is refused counts: it leads the next, which the other one obeys.
pub(crate) fn who_is_refused_for_a_conflict_stops() -> Result<(), String> {
    let say = |e: coldspare_core::control::Refusal| e.to_string();
    let active = |node, id| ControlRecord::active(CLUSTER, node, Epoch(2), SessionId([id; 16]), [1; 16]);
    let (refused, _) = step(&active(NODE, 1), Event::Contested { epoch: Epoch(2) }).map_err(say)?;
    let fresh = Fresh { id: SessionId([3; 16]), boot: [1; 16] };
    let (leads, _) = step(&refused, Event::Promote { proof: Proof::LossAccepted, applied: None, fresh }).map_err(say)?;
    let session = |record: &ControlRecord| record.session().ok_or("it has no session");
    let met = Event::Hello { cluster: CLUSTER, session: session(&active(NODE, 1))? };
    let (stopped, _) = step(&active(STANDBY, 2), met).map_err(say)?;
    let (follower, _) = step(&stopped, Event::Demote).map_err(say)?;
    let is_obeyed = step(&follower, Event::Hello { cluster: CLUSTER, session: session(&leads)? }).is_ok();
    holds(is_obeyed, "R3: a conflict can't be decided for the host that was refused")
}

/// Something wrote the home after it was handed over: as a standby it is not at the tree that the new session began with.
pub(crate) fn what_was_written_after_a_handover_is_divergence() -> Result<(), String> {
    let say = |e: coldspare_core::control::Refusal| e.to_string();
    let own = SessionId([1; 16]);
    let active = ControlRecord::active(CLUSTER, NODE, Epoch(2), own, [1; 16]);
    let (given, _) = step(&active, Event::HandOver { seq: Seq(5), digest: Digest([7; 32]) }).map_err(say)?;
    let session = Session { epoch: Epoch(3), id: SessionId([2; 16]), opened_by: STANDBY };
    let (fenced, _) = step(&given, Event::Taken { session }).map_err(say)?;
    let place = |digest| fenced.place_after_demotion(Digest(digest), Seq(6)).map(|place| place.session);
    holds(place([7; 32]) == Some(session.id), "R7: what was handed over is sent again")?;
    holds(place([8; 32]) == Some(own), "G5: what was written after a handover counts as replicated")
}
