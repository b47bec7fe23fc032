//! The table: each bug, the promise that it breaks, and the harness that notices it.

use coldspare_core::seeded_bugs::SeededBug;
use coldspare_sim::failover::Bounds;
use coldspare_sim::model::Defect::{self, StoreSyncs, Syncs};
use coldspare_sim::world;

use crate::{points, scenarios};

/// One bug.
pub(crate) struct Bug {
    pub(crate) name: &'static str,
    /// The promise of `docs/guarantees.md`.
    pub(crate) breaks: &'static str,
    pub(crate) switch: Switch,
    pub(crate) harness: Harness,
}

/// How a bug is switched on.
pub(crate) enum Switch {
    /// In the code, by its mark.
    Code(SeededBug),
    /// On the disk: syncs that do nothing.
    Disk(Defect),
    /// In how the world drives both ends.
    World(world::Defect),
}

/// Who notices a bug.
pub(crate) enum Harness {
    /// Both ends in the world, by seeds.
    World,
    /// Every crash state of these workloads.
    CrashStates(&'static [&'static str]),
    /// Who reads while a changeset is applied.
    Readers,
    /// One situation.
    Scenario(fn() -> Result<(), String>),
    /// Every order of events within these bounds.
    Model(Bounds),
}

impl Harness {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            World => "world",
            CrashStates(_) => "crash states",
            Readers => "readers",
            Scenario(_) => "scenario",
            Model(_) => "model checker",
        }
    }
}

impl Bug {
    /// As it stands in `docs/testing.md`.
    pub(crate) fn row(&self) -> String {
        format!("| `{}` | {} | {} |", self.name, self.breaks, self.harness.name())
    }
}

macro_rules! code {
    ($bug:ident, $breaks:literal, $harness:expr) => {
        Bug { name: stringify!($bug), breaks: $breaks, switch: Switch::Code(SeededBug::$bug), harness: $harness }
    };
}

const fn disk(name: &'static str, breaks: &'static str, defect: Defect, workloads: &'static [&'static str]) -> Bug {
    Bug { name, breaks, switch: Switch::Disk(defect), harness: CrashStates(workloads) }
}

const fn world(name: &'static str, breaks: &'static str, defect: world::Defect) -> Bug {
    Bug { name, breaks, switch: Switch::World(defect), harness: World }
}

use Harness::{CrashStates, Model, Readers, Scenario, World};

const QUIET: Bounds = Bounds { writes: 1, forced: 0, power_cuts: 0, kills: 0, planned: 0, messages: 7, offers: false };
const SWITCHOVER: Harness = Model(Bounds { planned: 1, power_cuts: 1, ..QUIET });
const RESTARTS: Harness = Model(Bounds { writes: 2, power_cuts: 2, ..QUIET });

const WORK: &[u8] = b"/home/.coldspare";
const STAGE: &[u8] = b"/home/.coldspare/stage";
const FILES: &[u8] = b"/home/.coldspare/stage/f";
const TREES: &[u8] = b"/home/.coldspare/stage/t";

pub(crate) const BUGS: &[Bug] = &[
    // What is forgotten to be synced.
    disk("work folders are not synced", "G3", Syncs(|s| s.path == WORK || s.path == STAGE), &["segments"]),
    disk("staged files are not synced", "G3", Syncs(|s| s.name == "sync_file" && s.path.starts_with(FILES)), &["push"]),
    disk("the folder of staged files is not synced", "G3", Syncs(|s| s.path == FILES), &["push"]),
    disk("files in new folders are not synced", "G3", Syncs(|s| s.name == "sync_file" && s.path.starts_with(TREES)), &["new folders"]),
    disk(
        "new folders are not synced",
        "G3",
        Syncs(|s| s.name == "sync_dir" && s.path.starts_with(TREES) && s.path != TREES),
        &["new folders"],
    ),
    disk("the folder of new folders is not synced", "G3", Syncs(|s| s.path == TREES), &["new folders"]),
    disk("changed folders are not synced", "G3", Syncs(|s| s.name == "sync_dir" && !s.path.starts_with(WORK)), &["push"]),
    disk("changed files are not synced", "G3", Syncs(|s| s.name == "sync_file" && !s.path.starts_with(WORK)), &["attributes"]),
    disk("the filesystem is not synced for a symlink", "G3", Syncs(|s| s.name == "sync_fs"), &["one after another"]),
    disk("renamed folders are not synced", "G3", Syncs(|s| s.name == "sync_dir" && !s.path.starts_with(WORK)), &["renamed folders"]),
    disk("the store is not synced", "G3", StoreSyncs, &["push"]),
    code!(StagedFilesystemIsNotSynced, "G3", CrashStates(&["many"])),
    code!(LeftContentIsNotSynced, "G3", CrashStates(&["resume"])),
    code!(DivergenceIsNotSynced, "G5", Scenario(scenarios::what_a_new_session_takes_away_survives_a_power_loss)),
    code!(ReplacedIsNotSynced, "G5", Scenario(scenarios::what_a_new_session_takes_away_survives_a_power_loss)),
    code!(TouchedFilesystemIsNotSynced, "G3", CrashStates(&["many"])),
    // Commit and recovery.
    code!(CommitsAreNotDurable, "G3", CrashStates(&["push"])),
    code!(AppliedBeforeCommit, "G1", CrashStates(&["push"])),
    code!(RecoveryIsSkipped, "G1", CrashStates(&["push"])),
    code!(StagedNamesAreUsedTwice, "G1", CrashStates(&["resume", "recovery"])),
    code!(FailedSyncsAreRepeated, "G3", Scenario(scenarios::what_a_failed_sync_was_to_write_is_never_acknowledged)),
    world("acknowledged before it is applied", "G3", world::Defect::AckBeforeFinish),
    // What the standby checks.
    code!(InlineDigestsAreNotChecked, "G2", Scenario(scenarios::content_without_its_digest_is_refused)),
    code!(StagedDigestsAreNotChecked, "G2", Scenario(scenarios::a_damaged_base_is_noticed)),
    code!(RebuiltDigestsAreNotChecked, "G2", Scenario(scenarios::a_damaged_index_makes_no_wrong_one)),
    code!(ReferencesAreNotChecked, "G2", Scenario(scenarios::a_reference_to_nothing_is_not_committed)),
    code!(LossesAreNotChecked, "G2", Scenario(scenarios::an_object_that_a_reference_needs_does_not_go)),
    code!(LeftOutIsNotAsked, "G2", Scenario(scenarios::what_follows_on_something_left_out_is_refused)),
    code!(SequenceIsNotChecked, "G4", Scenario(scenarios::an_older_changeset_is_refused)),
    code!(LowerEpochsAreServed, "G4", Scenario(scenarios::a_lower_epoch_is_refused)),
    code!(SpaceIsNotChecked, "G8", Scenario(scenarios::a_standby_without_room_refuses_before_it_commits)),
    code!(ForeignFilesAreTaken, "G5", Scenario(scenarios::what_is_of_somebody_else_goes_to_quarantine)),
    code!(DivergenceIsNotKept, "G5", Scenario(scenarios::what_a_new_session_takes_away_is_kept)),
    code!(KeepIsIgnored, "G2", World),
    code!(UnnamedStays, "G1", World),
    code!(EndsBeforeAllFrames, "G3", Scenario(scenarios::an_end_waits_for_its_frames)),
    world("frames count before they are staged", "G3", world::Defect::FramesAreNotStaged),
    // The order in which a changeset is applied.
    code!(ReferencesBeforeObjects, "G1", Readers),
    code!(IndexBeforePack, "G1", Readers),
    code!(DerivedBeforePacks, "G1", Readers),
    code!(ChainBeforeLayers, "G1", Readers),
    code!(PackedBeforeLoose, "G1", Readers),
    code!(LooseGoBeforePacked, "G1", Readers),
    code!(ObjectsGoFirst, "G1", Readers),
    code!(IndexGoesAfterPack, "G1", Readers),
    code!(DerivedGoesAfterPacks, "G1", Readers),
    code!(ForksBeforeParents, "G1", Readers),
    // Capture.
    code!(ObjectsBeforeReferences, "G2", World),
    code!(MentionsAfterObjects, "G2", Scenario(scenarios::objects_come_with_whatever_names_them)),
    code!(LayersNeedNotBeThere, "G2", Scenario(scenarios::a_chain_comes_with_its_layers_or_not_at_all)),
    code!(ReferencesOfTwoInstants, "G2", World),
    code!(TornFilesAreTaken, "G2", Scenario(scenarios::a_file_that_is_rewritten_is_never_torn)),
    code!(TransientFilesTravel, "G2", World),
    code!(FamiliesAreTornApart, "G2", Scenario(scenarios::a_family_stays_together)),
    code!(VanishedObjectsAreForgotten, "G2", Scenario(scenarios::objects_may_go_before_they_are_read)),
    code!(EarlierHeldAreForgotten, "G2", Scenario(scenarios::a_fork_waits_for_a_parent_that_is_held_back)),
    code!(LaterDivergenceIsNotKept, "G5", Scenario(scenarios::what_a_new_session_takes_away_later_is_kept)),
    code!(LossesAreLeftAside, "G3", Scenario(scenarios::a_cycle_that_lost_events_is_no_whole_one)),
    code!(UnknownFoldersAreLeftOut, "G3", World),
    code!(FoldersAreNotChecked, "G1", Scenario(scenarios::nothing_comes_without_its_folder)),
    code!(FoldersThatAreMetLostNothing, "G2", Scenario(scenarios::objects_may_move_to_a_pack_before_they_are_seen)),
    code!(UnseenLossesAreNotNoted, "G2", Scenario(scenarios::objects_may_go_before_they_are_seen)),
    code!(RemovedObjectsAreNotKept, "G2", Scenario(scenarios::objects_may_go_that_the_standby_has)),
    code!(DamagedReferencesTravel, "G2", Scenario(scenarios::an_empty_reference_does_not_replace_a_good_one)),
    code!(DamagedObjectsTravel, "G2", Scenario(scenarios::a_damaged_object_does_not_replace_a_good_one)),
    code!(ChangedPacksTravel, "G2", Scenario(scenarios::a_changed_pack_does_not_replace_the_good_one)),
    code!(RecentTimesAreTrusted, "G2", Scenario(scenarios::what_changed_within_a_clock_tick_is_read_again)),
    code!(UnmountedRootsAreCaptured, "G5", Scenario(scenarios::an_unmounted_root_is_no_deletion)),
    code!(BrakesAreOff, "G5", Scenario(scenarios::a_root_is_not_emptied_unasked)),
    code!(UnreadableIsGone, "G5", Scenario(scenarios::what_cannot_be_read_is_not_gone)),
    // What is due, and what is confirmed.
    code!(UnacknowledgedCountsAsSent, "G3", World),
    code!(RenamesLeaveWhatIsOwed, "G3", Scenario(scenarios::a_rename_leaves_nothing_behind)),
    code!(NumbersAreUsedTwice, "G1", World),
    code!(CheckpointsJoinTheCycle, "G3", World),
    code!(PartCountsAsAll, "G3", Scenario(scenarios::a_checkpoint_waits_for_what_is_left)),
    world("hints of a failed cycle are dropped", "G3", world::Defect::HintsAreDropped),
    world("hints that come during a capture are lost", "G3", world::Defect::LateHintsAreLost),
    code!(SessionsSurviveThePowerLoss, "G5", Scenario(scenarios::what_a_power_loss_took_is_kept)),
    // Roles.
    code!(ConflictsAreServed, "R3", Scenario(scenarios::two_openers_of_one_epoch_stop_each_other)),
    code!(ConflictsPass, "R3", Scenario(scenarios::who_is_refused_for_a_conflict_stops)),
    code!(EarlierSessionsAreServed, "R3", RESTARTS),
    code!(AnswersComeBeforeTheyAreStored, "R4", SWITCHOVER),
    code!(HandoversAreSentBeforeTheyAreStored, "R7", SWITCHOVER),
    code!(HandoversAreTakenAnywhere, "R7", SWITCHOVER),
    code!(PromotionsKeepTheEpoch, "R8", SWITCHOVER),
    code!(AnyTreeWasHandedOver, "G5", Scenario(scenarios::what_was_written_after_a_handover_is_divergence)),
    // Points.
    code!(HistoryIsNotKept, "G5", Scenario(points::a_point_is_not_left_unasked)),
    code!(HistoryIsNotSynced, "G5", Scenario(points::a_point_can_be_had_again_after_a_power_loss)),
    code!(RewoundGoesOn, "G5", Scenario(points::a_point_is_not_left_unasked)),
    // What is compared.
    code!(LeftOutIsCompared, "G7", World),
    code!(ComparedWhileUnderWay, "G7", Scenario(scenarios::nothing_is_compared_while_a_changeset_is_under_way)),
];
