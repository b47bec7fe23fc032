//! A standby on a model disk that is driven through changesets while every instant is kept at which it could crash.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use coldspare_core::changeset::Totals;
use coldspare_core::exclude::Exclude;
use coldspare_core::{Baseline, Seq, SessionId};
use coldspare_standby::{OpenError, RootSetup, Standby, StandbyError, Store};

use crate::Chance;

use super::crash::CrashPoint;
use super::disk::{ModelDisk, lock};
use super::draft::Draft;
use super::expected::Expected;
use super::fault::{CallKind, SyncCall};
use super::store::{ModelStore, StoreImage};

/// A standby in the making, and all its crash points so far.
pub struct Rehearsal {
    disk: ModelDisk,
    store: ModelStore,
    standby: Option<Standby<ModelDisk>>,
    seq: Seq,
    defect: Option<Defect>,
    record: Arc<Mutex<Record>>,
}

/// What the standby is made to forget.
#[derive(Debug, Clone, Copy)]
pub enum Defect {
    /// Syncs of files and folders for which this holds.
    Syncs(fn(&SyncCall<'_>) -> bool),
    /// All syncs of its store.
    StoreSyncs,
}

/// What a rehearsal leaves to be examined.
#[derive(Debug, Clone, Default)]
pub(super) struct Record {
    pub(super) points: Vec<Instant>,
    /// The tree of every changeset that may be found.
    pub(super) trees: BTreeMap<Seq, Expected>,
    acked: Option<Seq>,
    trying: Option<Seq>,
}

/// One instant at which the power may go.
#[derive(Debug, Clone)]
pub(super) struct Instant {
    pub(super) files: CrashPoint,
    pub(super) stores: Vec<StoreImage>,
    /// Stores that a torn write leaves: examined with few states of the files.
    pub(super) torn: Vec<StoreImage>,
    pub(super) acked: Option<Seq>,
    pub(super) trying: Option<Seq>,
}

pub(super) const SESSION: SessionId = SessionId([1; 16]);
pub(super) const ROOT: &str = "/home";

/// Torn states of the store that are taken at each of its syncs.
const TORN_AT_ONCE: usize = 12;

impl Rehearsal {
    pub(super) fn new(defect: Option<Defect>) -> Rehearsal {
        let (disk, store) = (ModelDisk::new(), ModelStore::default());
        disk.make_dirs(ROOT);
        disk.settle();
        if let Some(Defect::Syncs(which)) = defect {
            disk.skip_syncs(which);
        }
        if let Some(Defect::StoreSyncs) = defect {
            store.skip_syncs();
        }
        let mut rehearsal = Rehearsal { disk, store, standby: None, seq: Seq(0), defect, record: Arc::default() };
        lock(&rehearsal.record).trees.insert(Seq(0), Expected::default());
        // How a store is made is redb's affair, and nothing is to lose yet.
        drop(Store::open_in(rehearsal.store.clone()).expect("a new store"));
        rehearsal.watch();
        rehearsal.open().expect("a new standby");
        rehearsal
    }

    /// The tree of the last acknowledged changeset.
    pub fn tree(&self) -> Expected {
        let record = lock(&self.record);
        record.trees[&record.acked.unwrap_or_default()].clone()
    }

    /// The disk.
    pub fn disk(&self) -> &ModelDisk {
        &self.disk
    }

    /// Stages and finishes a changeset.
    pub fn changeset(&mut self, baseline: Kind, make: impl FnOnce(&mut Draft)) {
        let (draft, seq) = self.draft(baseline, make);
        let tried = self.try_out(&draft, seq, draft.steps(), true);
        tried.expect("a changeset that the standby takes");
    }

    /// Stages the first `steps` steps of a changeset and abandons it, as when the link is lost.
    pub fn cut_off(&mut self, baseline: Kind, steps: usize, make: impl FnOnce(&mut Draft)) {
        let (draft, seq) = self.draft(baseline, make);
        self.try_out(&draft, seq, steps, false).expect("staging that the standby takes");
        self.standby().abandon().expect("an end without trouble");
        lock(&self.record).trying = None;
    }

    /// Kills the standby and opens it again on what it wrote.
    pub fn restart(&mut self) {
        self.store.leave_alone();
        self.disk.leave_alone();
        let left = ModelStore::of(self.store.written());
        self.standby = None;
        self.store = left;
        if let Some(Defect::StoreSyncs) = self.defect {
            self.store.skip_syncs();
        }
        self.watch();
        self.open().expect("a standby that can be opened");
    }

    /// Cuts the power at the last instant but `back` for which a changeset is committed and not applied, and recovers from
    /// the whole of what was written, so that the crash points of a recovery are kept too.
    pub fn recover_from(&mut self, back: usize) {
        self.store.leave_alone();
        self.disk.leave_alone();
        let instant = {
            let record = lock(&self.record);
            let applying = |i: &&Instant| i.trying.is_some() && i.trying > i.acked;
            record.points.iter().rev().filter(applying).nth(back).cloned().expect("an instant within a changeset")
        };
        self.standby = None;
        self.disk = instant.files.whole().disk();
        if let Some(Defect::Syncs(which)) = self.defect {
            self.disk.skip_syncs(which);
        }
        self.store = ModelStore::of(instant.stores[0].clone());
        {
            let mut record = lock(&self.record);
            (record.acked, record.trying) = (instant.acked, instant.trying);
        }
        self.watch();
        self.open().expect("a recovery");
        let applied = self.standby().applied().map(|a| a.seq);
        let mut record = lock(&self.record);
        (record.acked, record.trying) = (applied, None);
    }

    pub(super) fn into_record(self) -> Record {
        self.store.leave_alone();
        self.disk.leave_alone();
        std::mem::take(&mut *lock(&self.record))
    }

    fn draft(&mut self, kind: Kind, make: impl FnOnce(&mut Draft)) -> (Draft, Seq) {
        self.seq = self.seq.next();
        let before = self.tree();
        let from = lock(&self.record).acked;
        let baseline = match kind {
            Kind::Full => Baseline::Full,
            Kind::Delta => Baseline::Delta(from.expect("an earlier changeset")),
        };
        let mut draft = Draft::new(baseline, &before, self.seq.0);
        make(&mut draft);
        (draft, self.seq)
    }

    fn try_out(&mut self, draft: &Draft, seq: Seq, steps: usize, finish: bool) -> Result<(), StandbyError> {
        let standby = self.standby.as_ref().expect("an open standby");
        {
            let mut record = lock(&self.record);
            record.trees.insert(seq, draft.expected.clone());
            record.trying = finish.then_some(seq);
        }
        standby.begin(SESSION, seq, draft.baseline(), seq)?;
        let ops = draft.stage(standby, seq, steps)?;
        if finish {
            standby.finish(seq, 1, Totals { ops, ..Totals::default() })?;
            let mut record = lock(&self.record);
            (record.acked, record.trying) = (Some(seq), None);
        }
        // The instant after the acknowledgement counts too.
        lock(&self.record).take(&self.disk, &self.store, false);
        Ok(())
    }

    fn standby(&self) -> &Standby<ModelDisk> {
        self.standby.as_ref().expect("an open standby")
    }

    fn open(&mut self) -> Result<(), OpenError> {
        self.standby = Some(open(&self.disk, &self.store)?);
        Ok(())
    }

    /// Keeps an instant before each call that changes something, and around each sync of the store.
    fn watch(&self) {
        let (record, store) = (self.record.clone(), self.store.clone());
        self.disk.on_call(move |disk, call| {
            if call.kind != CallKind::Looks {
                lock(&record).take(disk, &store, false);
            }
        });
        let (record, disk) = (self.record.clone(), self.disk.clone());
        self.store.on_sync(move |store| lock(&record).take(&disk, store, true));
    }
}

/// Which baseline a changeset has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It names everything.
    Full,
    /// It names what differs from the last acknowledged one.
    Delta,
}

impl Record {
    fn take(&mut self, disk: &ModelDisk, store: &ModelStore, is_sync: bool) {
        let mut stores = vec![store.durable()];
        let mut torn = Vec::new();
        if store.in_flight() > 0 {
            stores.push(store.written());
            let mut chance = Chance::new(self.points.len() as u64);
            if is_sync {
                torn.extend((0..TORN_AT_ONCE).map(|_| store.crashed(&mut chance)));
            }
        }
        let (acked, trying) = (self.acked, self.trying);
        self.points.push(Instant { files: disk.crash_point(), stores, torn, acked, trying });
    }
}

pub(super) fn open(disk: &ModelDisk, store: &ModelStore) -> Result<Standby<ModelDisk>, OpenError> {
    let setup = RootSetup { path: PathBuf::from(ROOT), way: None, exclude: Exclude::new(&[] as &[&str]).expect("no pattern") };
    Standby::open(disk.clone(), Store::open_in(store.clone())?, vec![setup])
}
