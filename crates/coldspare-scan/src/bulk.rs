//! What is put off: large content that travels beside the changesets, so that a small changeset needn't wait for it.
//!
//! A cycle that meets a file which would take too much of the link leaves its unit as it is on the standby, and the unit's
//! hints wait here until the standby has the content; then the unit is captured as any other, and the changeset names the
//! content without bringing it. A repository that is tied to one that waits waits with it.
//!
//! Invariants: what a cycle put off is hinted again once its content was sent, or can't be; a file is put off at most
//! `TRIES_MAX` times before it travels within a changeset.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use coldspare_core::changeset::{Ask, BulkEnd, FilePart, Have};
use coldspare_core::git::family::Repository;
use coldspare_core::{Baseline, Body, Digest, Entry, Op, RelPath, RootId, Seq, git};
use coldspare_delta::Packed;
use coldspare_os::{Disk, FileKind};

use crate::capture::{Capture, CaptureError, Certainty, Closed, Cycle, Outlet, Work};
use crate::dirty::{Dirty, Hints};
use crate::index::Row;
use crate::read::{Opened, Segments};
use crate::run::{Run, lock};
use crate::unit::Extent;
use crate::waiting::Waiting;
use crate::writer::{Change, Chunks, Writer};

/// LIMIT: bytes that one file takes of the link within a changeset: a third of a second at 100 Mbit/s.
pub(crate) const FILE_BYTES_MAX: u64 = 4 << 20;
/// LIMIT: bytes that the large files of one changeset take together, once each of them takes more than [`SHARE_BYTES`].
pub(crate) const CYCLE_BYTES_MAX: u64 = 8 << 20;
/// What a file may take whatever the others take.
pub(crate) const SHARE_BYTES: u64 = 512 << 10;
/// LIMIT: how often in a row a file is put off; one that keeps changing travels within a changeset then, however large it is.
const TRIES_MAX: u32 = 3;
/// LIMIT: files of which that is known; beyond, all are as new.
const TRIED_MAX: usize = 10_000;
/// How long a file waits that the standby has no room for, until it is asked again.
const ASK_FOR_ROOM_EVERY: Duration = Duration::from_secs(5);
/// LIMIT: how long a sender may not notice that its connection is gone while there is nothing to send.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A path of a root.
type At = (RootId, RelPath);

/// Where bulk goes. May block: that is the backpressure.
pub trait BulkOutlet: Sync {
    /// Asks what the standby has of a file of which only path and size are known.
    ///
    /// # Errors
    /// [`Closed`]: the link is gone.
    fn ask(&self, item: Ask) -> Result<Have, Closed>;

    /// Takes a part of a file.
    ///
    /// # Errors
    /// [`Closed`]: the link is gone.
    fn segment(&self, part: FilePart, literal: Packed, raw_len: usize) -> Result<(), Closed>;

    /// Ends a file, and waits until the standby has it, durably, or says that it hasn't.
    ///
    /// # Errors
    /// [`Closed`]: the link is gone.
    fn end(&self, end: BulkEnd) -> Result<Have, Closed>;

    /// Whether the link is gone.
    fn is_closed(&self) -> bool;
}

/// What is put off, and what became of it.
#[derive(Default)]
pub struct Bulk {
    state: Mutex<State>,
    changed: Condvar,
    /// The last changeset that was acknowledged: what it has can be copied from.
    acked: AtomicU64,
    /// Counts the files that were begun.
    next_file: AtomicU32,
    /// Held by whoever sends.
    sending: Mutex<()>,
    /// Whether anything was sent since the standby was last told that no more comes.
    is_used: AtomicBool,
}

#[derive(Default)]
struct State {
    /// Units whose hints wait. Memory: as that of the hints.
    parked: BTreeMap<At, Parked>,
    /// Files that are to be sent.
    queue: VecDeque<Item>,
    /// Those of them that the standby had no room for, when it was asked last.
    no_room: BTreeMap<At, NoRoom>,
    /// How often files were put off since the standby last had them.
    tries: BTreeMap<At, u32>,
    /// Those of them that are in a changeset which isn't answered.
    handed: BTreeMap<At, Seq>,
    /// What the index is to say of files that were sent.
    sent: Vec<Change>,
}

#[derive(Clone, Copy)]
struct NoRoom {
    asked: Instant,
    /// The size of the file.
    bytes: u64,
}

#[derive(Default)]
struct Parked {
    hints: Hints,
    /// Those of its files that are to be sent.
    files: BTreeSet<At>,
}

/// A file that is put off.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    pub(crate) at: At,
    /// The repository that it is in.
    pub(crate) unit: Option<Repository>,
}

impl Item {
    /// The unit that waits for it.
    fn parked_as(&self) -> At {
        self.unit.clone().unwrap_or_else(|| self.at.clone())
    }
}

/// What became of a file.
enum Fate {
    /// The standby has it; the index is to say so.
    Sent(Change),
    /// Not as it was read, or not there any more.
    Changed,
    /// It has to travel within a changeset, which says what is wrong with it.
    Not,
    /// It waits: the standby has no room for its bytes.
    NoRoom(u64),
}

impl State {
    /// The next file that is to be sent.
    fn due(&self, now: Instant) -> Option<Item> {
        let waits = |item: &&Item| self.no_room.get(&item.at).is_some_and(|file| now.duration_since(file.asked) < ASK_FOR_ROOM_EVERY);
        self.queue.iter().find(|item| !waits(item)).cloned()
    }
}

impl Bulk {
    /// Whether a unit waits, or a file that is a unit.
    pub(crate) fn is_parked(&self, at: &At) -> bool {
        lock(&self.state).parked.contains_key(at)
    }

    /// Whether anything is put off.
    pub fn is_any(&self) -> bool {
        !lock(&self.state).parked.is_empty()
    }

    /// The repositories, and files, that wait.
    pub(crate) fn parked(&self) -> Vec<At> {
        lock(&self.state).parked.keys().cloned().collect()
    }

    /// Whether a path is put off, or what it is in.
    pub(crate) fn covers(&self, root: RootId, path: &RelPath) -> bool {
        lock(&self.state).parked.keys().any(|(r, at)| *r == root && path.is_within(at))
    }

    /// Since when the oldest of it waits, in milliseconds since 1970, and the same by repository.
    pub fn waiting(&self) -> (Option<u64>, Waiting) {
        let state = lock(&self.state);
        let mut waiting = Waiting::default();
        state.parked.values().for_each(|parked| waiting.merge(parked.hints.waiting.clone()));
        (state.parked.values().filter_map(|parked| parked.hints.oldest_ms).min(), waiting)
    }

    /// The files that wait since the standby has no room for them, and their bytes.
    pub fn without_room(&self) -> Vec<(RelPath, u64)> {
        lock(&self.state).no_room.iter().map(|((_, path), file)| (path.clone(), file.bytes)).collect()
    }

    /// A link was made: `acked` is what the standby acknowledged last; it may have something left from before.
    pub fn connected(&self, acked: Seq) {
        self.acknowledged(acked);
        self.is_used.store(true, Ordering::Relaxed);
    }

    /// Takes note of what the standby acknowledged last.
    pub fn acknowledged(&self, seq: Seq) {
        self.acked.store(seq.0, Ordering::Relaxed);
        let State { tries, handed, .. } = &mut *lock(&self.state);
        handed.retain(|at, sent| {
            if *sent <= seq {
                tries.remove(at);
            }
            *sent > seq
        });
    }

    /// The changeset `seq` was given up: what it had counts as put off as often as before.
    pub fn given_up(&self, seq: Seq) {
        lock(&self.state).handed.retain(|_, sent| *sent != seq);
    }

    /// Whether the standby is to be told, once, that no bulk is under way or awaited any more.
    pub fn take_over(&self) -> bool {
        !self.is_any() && self.is_used.swap(false, Ordering::Relaxed)
    }

    /// Wakes who sends, so that it notices that its connection is gone.
    pub fn wake(&self) {
        self.changed.notify_all();
    }

    /// Whether a file may be put off once more.
    pub(crate) fn may_wait(&self, at: &At) -> bool {
        lock(&self.state).tries.get(at).is_none_or(|tries| *tries < TRIES_MAX)
    }

    /// A file is handed over with the changeset `seq`.
    pub(crate) fn handed_over(&self, root: RootId, path: &RelPath, seq: Seq) {
        let mut state = lock(&self.state);
        if !state.tries.is_empty() && state.tries.contains_key(&(root, path.clone())) {
            state.handed.insert((root, path.clone()), seq);
        }
    }

    /// Takes what the index is to say of files that were sent.
    pub(crate) fn take_sent(&self) -> Vec<Change> {
        std::mem::take(&mut lock(&self.state).sent)
    }

    /// A changeset names everything: nothing waits any more.
    pub(crate) fn clear(&self, dirty: &mut Dirty) {
        let mut state = lock(&self.state);
        state.queue.clear();
        state.no_room.clear();
        state.parked.values_mut().for_each(|parked| parked.files.clear());
        release(&mut state, dirty);
    }

    /// Puts off files, and the units that wait for them or with them.
    pub(crate) fn park(&self, items: Vec<Item>, units: Vec<(At, Hints)>, dirty: &mut Dirty) {
        let mut state = lock(&self.state);
        for (at, hints) in units {
            state.parked.entry(at).or_default().hints.merge(hints);
        }
        for item in items {
            let parked = state.parked.entry(item.parked_as()).or_default();
            if parked.files.insert(item.at.clone()) {
                if state.tries.len() >= TRIED_MAX {
                    state.tries.clear();
                    state.handed.clear();
                }
                *state.tries.entry(item.at.clone()).or_default() += 1;
                tracing::debug!(path = %item.at.1, "put off: its content is sent as bulk");
                state.queue.push_back(item);
            }
        }
        if state.parked.values().all(|parked| parked.files.is_empty()) {
            release(&mut state, dirty);
        }
        drop(state);
        self.is_used.store(true, Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// The next file to send; `None` once the link is gone.
    fn next(&self, outlet: &dyn BulkOutlet) -> Option<Item> {
        let mut state = lock(&self.state);
        loop {
            if outlet.is_closed() {
                return None;
            }
            if let Some(item) = state.due(Instant::now()) {
                return Some(item);
            }
            state = self.changed.wait_timeout(state, LOOK_EVERY).unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }

    /// Takes note of what became of a file; says whether a unit waits no longer.
    fn done(&self, item: &Item, fate: Fate, dirty: &mut Dirty) -> bool {
        let mut state = lock(&self.state);
        let place = state.queue.iter().position(|queued| queued.at == item.at);
        if let (Fate::NoRoom(bytes), Some(_)) = (&fate, place) {
            let noted = NoRoom { asked: Instant::now(), bytes: *bytes };
            if state.no_room.insert(item.at.clone(), noted).is_none() {
                tracing::warn!(path = %item.at.1, bytes, "the standby has no room for it: what it belongs to waits");
            }
            // What was sent in vain, since the room went meanwhile, doesn't count.
            state.tries.insert(item.at.clone(), 1);
            return false;
        }
        place.map(|place| state.queue.remove(place));
        state.no_room.remove(&item.at);
        match fate {
            Fate::Sent(change) => state.sent.push(change),
            Fate::Changed | Fate::NoRoom(_) => {}
            Fate::Not => drop(state.tries.insert(item.at.clone(), TRIES_MAX)),
        }
        let parked = state.parked.get_mut(&item.parked_as());
        let is_ready = parked.is_none_or(|parked| {
            parked.files.remove(&item.at);
            parked.files.is_empty()
        });
        if is_ready {
            release(&mut state, dirty);
        }
        is_ready
    }
}

/// Hints again what has nothing to wait for; those that only waited with others find out whether these still do.
fn release(state: &mut State, dirty: &mut Dirty) {
    state.parked.retain(|_, parked| {
        if parked.files.is_empty() {
            dirty.restore(std::mem::take(&mut parked.hints));
        }
        !parked.files.is_empty()
    });
}

/// What is read as bulk is handed over as that.
struct Beside<'a>(&'a dyn BulkOutlet);

impl Outlet for Beside<'_> {
    fn batch(&self, _: Vec<Op>, _: Packed, _: usize) -> Result<(), Closed> {
        unreachable!("bulk has no operations")
    }

    fn segment(&self, part: FilePart, literal: Packed, raw_len: usize) -> Result<(), Closed> {
        self.0.segment(part, literal, raw_len)
    }

    fn ask(&self, items: Vec<Ask>) -> Result<Vec<Have>, Closed> {
        items.into_iter().map(|item| self.0.ask(item)).collect()
    }
}

impl<D: Disk> Capture<D> {
    /// Has large content put off instead of letting changesets wait for it; somebody has to call [`Capture::send_bulk`].
    pub fn with_bulk(mut self) -> Capture<D> {
        self.bulk = self.watch.is_some().then(Bulk::default);
        self
    }

    /// Sends what is put off, one file after the other, until the link is gone; `on_ready` is called when there are hints of
    /// what was put off.
    ///
    /// Cost: one thread; each file is read once, of what the standby has in part twice.
    ///
    /// # Errors
    /// `Index`.
    pub fn send_bulk(&self, outlet: &dyn BulkOutlet, on_ready: &dyn Fn()) -> Result<(), CaptureError> {
        let (Some(bulk), Some(watch)) = (&self.bulk, &self.watch) else { return Ok(()) };
        let _one_at_a_time = lock(&bulk.sending);
        while let Some(item) = bulk.next(outlet) {
            let fate = match self.send_one(bulk, &item, outlet) {
                Err(CaptureError::Closed) => return Ok(()), // the next connection goes on with it
                fate => fate?,
            };
            let is_ready = bulk.done(&item, fate, &mut watch.dirty());
            if is_ready {
                on_ready();
            }
        }
        Ok(())
    }

    fn send_one(&self, bulk: &Bulk, item: &Item, outlet: &dyn BulkOutlet) -> Result<Fate, CaptureError> {
        let baseline = Baseline::Delta(Seq(bulk.acked.load(Ordering::Relaxed)));
        let cycle = Cycle { seq: Row::UNSENT, baseline, certainty: Certainty::Sure, work: Work::Hinted, literal: BTreeSet::new() };
        let snapshot = self.index.snapshot()?;
        let beside = Beside(outlet);
        std::thread::scope(|scope| {
            let writer = Writer::start(scope, &self.index);
            let mut run = Run::new(self, &cycle, snapshot, &writer, &beside);
            run.bulk = None;
            run.next_file.store(bulk.next_file.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
            if let Some(unit) = &item.unit {
                run.units.add(unit.clone(), Extent::Hinted, None);
            }
            let fate = run.send_as_bulk(item, outlet);
            drop(run);
            writer.finish()?;
            fate
        })
    }
}

impl<D: Disk> Run<'_, D> {
    /// Leaves a file, and the unit that it is, to a later cycle, once its content is on the standby.
    pub(crate) fn put_off(&self, root: RootId, path: &RelPath) {
        let unit = self.units.of(root, path);
        unit.iter().for_each(|unit| unit.wait());
        let unit = unit.map(|unit| unit.at.clone());
        // An index isn't looked at without its pack: it would be found one cycle later. One that the standby makes by itself
        // needs no content.
        let index = if git::is_pack(path) { git::beside(path, "idx") } else { None };
        let is_large = |at: &RelPath| self.stat_of(root, at).is_some_and(|stat| stat.size > FILE_BYTES_MAX && stat.nlink == 1);
        let index = index.filter(|at| is_large(at) && !self.has_names_for(root, at));
        let items = [Some(path.clone()), index].into_iter().flatten().map(|path| Item { at: (root, path), unit: unit.clone() });
        lock(&self.put_offs).extend(items);
    }

    fn send_as_bulk(&self, item: &Item, outlet: &dyn BulkOutlet) -> Result<Fate, CaptureError> {
        let (root, path) = (item.at.0, &item.at.1);
        let Ok(file) = self.open(root, path) else { return Ok(Fate::Changed) };
        if file.before.kind != FileKind::File {
            return Ok(Fate::Changed);
        }
        let row = self.snapshot.row(root, path)?;
        let size = file.before.size;
        let there = outlet.ask(Ask { root, path: path.clone(), digest: Digest([0; 32]), size })?;
        let held = match there {
            Have::Part(digests) => match self.held_blocks(&file, &digests) {
                Ok(held) => Some(held),
                Err(_) => return Ok(Fate::Not),
            },
            Have::NoRoom => return Ok(Fate::NoRoom(size)),
            Have::Missing | Have::AtPath | Have::Staged => None,
        };
        let (sent, inspection) = match self.send_segments(&file, row.as_ref(), held)? {
            Ok(Segments::Sent(sent, inspection)) => (sent, inspection),
            Ok(Segments::Changed | Segments::PutOff) => return Ok(Fate::Changed),
            Err(_) => return Ok(Fate::Not),
        };
        let digest = Digest(sent.digest);
        if self.damage(&file, inspection, row.as_ref(), digest).is_some() {
            return Ok(Fate::Not);
        }
        let entry = Entry { meta: file.meta().clone(), body: Body::File { size, digest, sparse: file.is_sparse() } };
        if entry.check(path).is_err() {
            return Ok(Fate::Not);
        }
        let end = BulkEnd { file: sent.file, root, path: path.clone(), digest, size, segments: sent.segments };
        if outlet.end(end)? != Have::Staged {
            return Ok(Fate::Changed);
        }
        let chunks = sent.known.map_or(Chunks::None, Chunks::Are);
        Ok(Fate::Sent(self.put(root, path, self.row_of(&file, entry), chunks)))
    }

    /// The row for a file that was read.
    fn row_of(&self, file: &Opened<'_, D>, entry: Entry) -> Row {
        self.row(None, entry, &file.before, file.at_ms())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dirty::Hint;

    fn at(path: &str) -> At {
        (RootId(0), RelPath::new(path.as_bytes()).unwrap())
    }

    fn hints(path: &str, since_ms: u64) -> Hints {
        let mut dirty = Dirty::default();
        dirty.add(RootId(0), at(path).1, b"HEAD", Hint::Changed, since_ms);
        dirty.take()
    }

    fn item(repository: &str, file: &str) -> Item {
        Item { at: at(&format!("{repository}/{file}")), unit: Some(at(repository)) }
    }

    #[test]
    fn a_unit_is_hinted_again_once_all_of_its_content_is_there_and_with_it_what_waits_for_others() {
        let (bulk, mut dirty) = (Bulk::default(), Dirty::default());
        let (one, two) = (item("r/1", "a.pack"), item("r/1", "b.pack"));
        let units = vec![(at("r/1"), hints("r/1", 5)), (at("fork"), hints("fork", 7))];
        bulk.park(vec![one.clone(), two.clone(), item("r/2", "c.pack")], units, &mut dirty);
        assert!(bulk.is_parked(&at("r/1")) && bulk.is_parked(&at("fork")) && dirty.is_empty());
        assert_eq!(bulk.waiting().0, Some(5), "the lag counts it");
        assert!(!bulk.done(&one, Fate::Changed, &mut dirty) && dirty.is_empty());
        assert!(bulk.done(&two, Fate::Changed, &mut dirty));
        assert!(dirty.knows(RootId(0), &at("r/1/HEAD").1) && dirty.knows(RootId(0), &at("fork/HEAD").1));
        assert_eq!(bulk.parked(), [at("r/2")]);
    }

    #[test]
    fn what_the_standby_has_no_room_for_waits_and_the_others_go_on() {
        let (bulk, mut dirty) = (Bulk::default(), Dirty::default());
        let (large, other) = (item("r/1", "a.pack"), item("r/2", "b.pack"));
        let units = vec![(at("r/1"), hints("r/1", 5)), (at("r/2"), hints("r/2", 6))];
        bulk.park(vec![large.clone(), other.clone()], units, &mut dirty);
        let due = |after: Duration| lock(&bulk.state).due(Instant::now() + after).map(|item| item.at);
        assert_eq!(due(Duration::ZERO), Some(large.at.clone()));
        for _ in 0..TRIES_MAX + 1 {
            assert!(!bulk.done(&large, Fate::NoRoom(7), &mut dirty) && dirty.is_empty());
        }
        assert!(bulk.is_parked(&at("r/1")) && bulk.may_wait(&large.at), "it never travels within a changeset");
        assert_eq!(bulk.without_room(), [(large.at.1.clone(), 7)]);
        assert_eq!(due(Duration::ZERO), Some(other.at.clone()));
        assert!(bulk.done(&other, Fate::Changed, &mut dirty) && dirty.knows(RootId(0), &at("r/2/HEAD").1));
        assert_eq!(due(Duration::ZERO), None);
        assert_eq!(due(ASK_FOR_ROOM_EVERY), Some(large.at.clone()), "there may be room now");
        assert!(bulk.done(&large, Fate::Changed, &mut dirty) && dirty.knows(RootId(0), &at("r/1/HEAD").1));
        assert!(bulk.without_room().is_empty());
    }

    #[test]
    fn what_waits_with_others_that_do_not_wait_any_more_is_hinted_at_once() {
        let (bulk, mut dirty) = (Bulk::default(), Dirty::default());
        bulk.park(Vec::new(), vec![(at("fork"), hints("fork", 7))], &mut dirty);
        assert!(!bulk.is_any() && dirty.knows(RootId(0), &at("fork/HEAD").1));
    }

    #[test]
    fn a_file_is_put_off_some_times_and_anew_after_it_was_handed_over() {
        let (bulk, mut dirty) = (Bulk::default(), Dirty::default());
        let file = item("r/1", "a.pack");
        for _ in 0..TRIES_MAX {
            assert!(bulk.may_wait(&file.at));
            bulk.park(vec![file.clone()], Vec::new(), &mut dirty);
            bulk.done(&file, Fate::Changed, &mut dirty);
        }
        assert!(!bulk.may_wait(&file.at));
        for seq in [Seq(4), Seq(5)] {
            bulk.handed_over(file.at.0, &file.at.1, seq);
            bulk.given_up(Seq(4));
            assert!(!bulk.may_wait(&file.at), "the standby doesn't have it");
        }
        bulk.acknowledged(Seq(5));
        assert!(bulk.may_wait(&file.at));
        bulk.park(vec![file.clone()], Vec::new(), &mut dirty);
        bulk.done(&file, Fate::Not, &mut dirty);
        assert!(!bulk.may_wait(&file.at), "a changeset says what is wrong with it");
    }
}
