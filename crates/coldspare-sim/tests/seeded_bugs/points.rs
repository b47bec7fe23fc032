//! What the history has to keep so that a point can be had again.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use coldspare_core::changeset::Totals;
use coldspare_core::exclude::Exclude;
use coldspare_core::{Baseline, Body, ContentRef, Digest, Entry, Meta, Op, RelPath, RootId, Seq, SessionId, Time};
use coldspare_sim::model::{CallKind, ModelDisk, ModelStore, Order, StoreImage};
use coldspare_standby::{PointNo, RootSetup, Standby, StandbyError, Store};

const HOME: &str = "home";
const SESSION: SessionId = SessionId([1; 16]);
const KEPT: [&str; 3] = ["file", "replaced", "folder/file"];

fn path(path: &str) -> RelPath {
    RelPath::new(path.as_bytes()).unwrap()
}

fn put(at: &str, content: Option<&[u8]>) -> Op {
    let meta = Meta { mode: 0o755, uid: 0, gid: 0, mtime: Time { secs: 1, nanos: 0 }, xattrs: Vec::new() };
    let body = match content {
        Some(content) => Body::File { size: content.len() as u64, digest: Digest(coldspare_delta::digest(content)), sparse: false },
        None => Body::Dir,
    };
    let content = if content.is_some() { ContentRef::Inline } else { ContentRef::None };
    Op::Put { root: RootId(0), path: path(at), entry: Entry { meta, body }, content }
}

fn open(disk: &ModelDisk, store: ModelStore) -> Result<Standby<ModelDisk>, String> {
    let setup = RootSetup { path: PathBuf::from(HOME), way: None, exclude: Exclude::new(&[] as &[&str]).unwrap() };
    Standby::open(disk.clone(), Store::open_in(store).unwrap(), vec![setup]).map_err(|e| e.to_string())
}

fn apply(standby: &Standby<ModelDisk>, seq: u64, baseline: Baseline, ops: Vec<Op>, payload: &[u8]) -> Result<(), StandbyError> {
    let totals = Totals { ops: ops.len() as u64, ..Totals::default() };
    standby.begin(SESSION, Seq(seq), baseline, Seq(seq))?;
    standby.stage_batch(Seq(seq), ops, payload)?;
    standby.finish(Seq(seq), 1, totals).map(drop)
}

/// A standby with one changeset, all of it durable.
fn standby() -> (ModelDisk, ModelStore, Standby<ModelDisk>) {
    let (disk, store) = (ModelDisk::new(), ModelStore::default());
    disk.make_dirs(HOME);
    let standby = open(&disk, store.clone()).unwrap();
    let mut ops = vec![put("folder", None)];
    ops.extend(KEPT.map(|path| put(path, Some(b"only here"))));
    apply(&standby, 1, Baseline::Full, ops, &b"only here".repeat(KEPT.len())).unwrap();
    disk.settle();
    (disk, store, standby)
}

/// Replaces a file, removes one, and a folder with another.
fn change(standby: &Standby<ModelDisk>) -> Result<(), StandbyError> {
    let delete = |at: &str| Op::Delete { root: RootId(0), path: path(at) };
    apply(standby, 2, Baseline::Delta(Seq(1)), vec![put("replaced", Some(b"newer")), delete("file"), delete("folder")], b"newer")
}

/// The power goes at any call while a changeset is committed and applied.
pub(crate) fn a_point_can_be_had_again_after_a_power_loss() -> Result<(), String> {
    let (disk, store, standby) = standby();
    let instants = Arc::new(Mutex::new(Vec::new()));
    let (taken, image) = (instants.clone(), store.clone());
    disk.on_call(move |disk, call| {
        if call.kind != CallKind::Looks {
            taken.lock().unwrap().push((disk.crash_point(), image.durable()));
        }
    });
    change(&standby).unwrap();
    disk.leave_alone();
    let (mut result, mut looked) = (Ok(()), 0);
    let last = [(disk.crash_point(), store.durable())];
    for (number, (files, store)) in instants.lock().unwrap().iter().chain(&last).enumerate() {
        for order in [Order::Journal, Order::Any] {
            files.for_each(order, 60, number as u64, &mut |crashed| {
                let judged = is_had_again(&crashed.disk(), store, &mut looked);
                if let (Ok(()), Err(e)) = (&result, judged) {
                    result = Err(format!("G5: at call {number}, {order:?}: {e}"));
                }
            });
        }
    }
    if looked == 0 { Err("no state had the changeset".into()) } else { result }
}

fn is_had_again(disk: &ModelDisk, store: &StoreImage, looked: &mut u32) -> Result<(), String> {
    let standby = open(disk, ModelStore::of(store.clone()))?;
    if standby.applied().is_none_or(|applied| applied.seq != Seq(2)) {
        return Ok(());
    }
    *looked += 1;
    standby.rewind(PointNo(1)).map_err(|e| e.to_string())?;
    let tree = disk.tree(HOME).map_err(|e| e.to_string())?;
    match KEPT.iter().find(|at| tree.get(at.as_bytes()).is_none_or(|seen| seen.content != b"only here")) {
        Some(at) => Err(format!("{at} isn't as it was")),
        None => Ok(()),
    }
}

/// A standby that a person brought back stays there.
pub(crate) fn a_point_is_not_left_unasked() -> Result<(), String> {
    let (_, store, standby) = standby();
    change(&standby).map_err(|e| e.to_string())?;
    let gone = standby.rewind(PointNo(1)).map_err(|e| format!("G5: {e}"))?;
    drop(store);
    match standby.begin(SESSION, Seq(3), Baseline::Full, Seq(3)) {
        Err(StandbyError::Rewound { .. }) if gone.seq == Seq(1) => Ok(()),
        other => Err(format!("G5: it is carried forward: {other:?}")),
    }
}
