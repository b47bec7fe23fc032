//! Bugs that are built in on purpose, to show that the tests notice them.
//!
//! Without the feature `seeded-bugs`, which no build that ships has, [`seeded_bug!`](crate::seeded_bug) is `false` and
//! nothing else of this module exists.
//!
//! One bug is on at a time, for the whole process: captures and recoveries work on threads of their own, which a switch of
//! one thread would not reach.

/// Whether a bug is switched on: `false` without the feature `seeded-bugs`.
#[cfg(not(feature = "seeded-bugs"))]
#[macro_export]
macro_rules! seeded_bug {
    ($bug:ident) => {
        false
    };
}

/// Whether a bug is switched on: `false` without the feature `seeded-bugs`.
#[cfg(feature = "seeded-bugs")]
#[macro_export]
macro_rules! seeded_bug {
    ($bug:ident) => {
        $crate::seeded_bugs::is_on($crate::seeded_bugs::SeededBug::$bug)
    };
}

#[cfg(feature = "seeded-bugs")]
pub use switch::{SeededBug, Switched, is_on, reached, switch};

#[cfg(feature = "seeded-bugs")]
mod switch {
    use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
    use std::sync::{Mutex, MutexGuard, PoisonError};

    /// What goes wrong while it is on. Each stands at one place of the code, or at a few that do the same.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    #[repr(u32)]
    pub enum SeededBug {
        /// Objects are applied after the references that need them.
        ReferencesBeforeObjects = 1,
        /// A pack's index is applied before the pack.
        IndexBeforePack,
        /// A multi-pack index or commit graph is applied before the packs that it names.
        DerivedBeforePacks,
        /// Layers of a commit graph are applied after the chain that names them.
        ChainBeforeLayers,
        /// Packed references are applied before loose ones.
        PackedBeforeLoose,
        /// Loose references are removed before the packed ones are there.
        LooseGoBeforePacked,
        /// Objects are removed before what replaces them is there.
        ObjectsGoFirst,
        /// A pack's index is removed after the pack.
        IndexGoesAfterPack,
        /// A multi-pack index is removed after the packs that it names.
        DerivedGoesAfterPacks,
        /// Forks are applied before what they borrow from, and removed after it.
        ForksBeforeParents,
        /// Locks and half written files of git travel.
        TransientFilesTravel,
        /// What borrows objects from a repository that is kept is not kept with it.
        FamiliesAreTornApart,
        /// A changeset is finished at its end, though frames of it are still to be staged.
        EndsBeforeAllFrames,
        /// A checkpoint is covered by the cycle under way.
        CheckpointsJoinTheCycle,
        /// A checkpoint is confirmed though something was left to the next cycle.
        PartCountsAsAll,
        /// An active of a lower epoch than promised is served.
        LowerEpochsAreServed,
        /// A host that lost its power goes on with its session.
        SessionsSurviveThePowerLoss,
        /// The tree is changed before the commit is recorded.
        AppliedBeforeCommit,
        /// Where much is staged, the filesystem is not synced before the commit.
        StagedFilesystemIsNotSynced,
        /// The content of an interrupted changeset is recorded before it is synced.
        LeftContentIsNotSynced,
        /// Where much was changed, the filesystem is not synced before the acknowledgement.
        TouchedFilesystemIsNotSynced,
        /// No transaction of the standby's store is durable.
        CommitsAreNotDurable,
        /// A committed changeset is not finished at the start.
        RecoveryIsSkipped,
        /// Whether a changeset follows the last one is not looked at.
        SequenceIsNotChecked,
        /// After a failed sync the standby goes on and syncs once more.
        FailedSyncsAreRepeated,
        /// Whatever a changeset takes from the standby, nobody is asked.
        BrakesAreOff,
        /// A standby without room takes changesets.
        SpaceIsNotChecked,
        /// A restarted standby gives names of staged content that are in use.
        StagedNamesAreUsedTwice,
        /// The digest of content that comes in a batch is not checked.
        InlineDigestsAreNotChecked,
        /// The digest of content that is assembled or staged before is not checked.
        StagedDigestsAreNotChecked,
        /// Whether references have their objects is not looked at before a commit.
        ReferencesAreNotChecked,
        /// Whether references keep their objects where objects go is not looked at before a commit.
        LossesAreNotChecked,
        /// What the active holds back is changed all the same.
        KeepIsIgnored,
        /// What coldspare did not put there is replaced and removed.
        ForeignFilesAreTaken,
        /// What the first changeset of a session takes away is not kept.
        DivergenceIsNotKept,
        /// The list of what the first changeset of a session takes away is not synced.
        DivergenceIsNotSynced,
        /// A file is replaced before its name in the quarantine is durable.
        ReplacedIsNotSynced,
        /// A changeset that names everything leaves what it doesn't name.
        UnnamedStays,
        /// Objects are captured before references.
        ObjectsBeforeReferences,
        /// What names objects, and is no reference, is captured after them.
        MentionsAfterObjects,
        /// References are not compared with what they are after they were read.
        ReferencesOfTwoInstants,
        /// A file that changes while it is read is taken as read.
        TornFilesAreTaken,
        /// References are not inspected.
        DamagedReferencesTravel,
        /// Objects and packs are not inspected.
        DamagedObjectsTravel,
        /// A pack that changed under its name is sent.
        ChangedPacksTravel,
        /// What was captured and not acknowledged counts as sent.
        UnacknowledgedCountsAsSent,
        /// A file that changed within a clock tick of the look counts as unchanged.
        RecentTimesAreTrusted,
        /// A root without its marker is captured.
        UnmountedRootsAreCaptured,
        /// A changeset is taken though the active didn't know what the one before left out.
        LeftOutIsNotAsked,
        /// What can't be read counts as gone.
        UnreadableIsGone,
        /// Objects that went before they were read are not asked for.
        VanishedObjectsAreForgotten,
        /// What is tied to a repository that is held back since an earlier cycle is sent.
        EarlierHeldAreForgotten,
        /// What leaves after the first changeset of a session what that left as it was, is not kept.
        LaterDivergenceIsNotKept,
        /// Events that were lost before the work was chosen are left aside.
        LossesAreLeftAside,
        /// What lies in a folder that the index doesn't have is looked at without that folder.
        UnknownFoldersAreLeftOut,
        /// Nobody asks for the folder of what comes.
        FoldersAreNotChecked,
        /// Nothing went from a folder of objects before it was looked at for the first time.
        FoldersThatAreMetLostNothing,
        /// Objects that went before they were seen are not asked for.
        UnseenLossesAreNotNoted,
        /// Objects go from the standby though references changed since.
        RemovedObjectsAreNotKept,
        /// Renamed folders go first, whatever else was captured and not acknowledged.
        RenamesLeaveWhatIsOwed,
        /// A number of a changeset is used twice.
        NumbersAreUsedTwice,
        /// An active that opened the same epoch as another is served.
        ConflictsAreServed,
        /// An active that is refused since another one opened its epoch is that still.
        ConflictsPass,
        /// A session that was left for a later one is served.
        EarlierSessionsAreServed,
        /// What the other node may rely on is answered before it is stored.
        AnswersComeBeforeTheyAreStored,
        /// A handover is sent before it is stored.
        HandoversAreSentBeforeTheyAreStored,
        /// A handover is taken whatever the tree is.
        HandoversAreTakenAnywhere,
        /// A promotion opens the epoch that is open already.
        PromotionsKeepTheEpoch,
        /// A host that handed over counts as having that tree, whatever it has.
        AnyTreeWasHandedOver,
        /// A chain of commit graphs is handed over whatever became of its layers.
        LayersNeedNotBeThere,
        /// What a changeset replaces is not kept.
        HistoryIsNotKept,
        /// Names in the history are not synced before the files lose theirs in the tree.
        HistoryIsNotSynced,
        /// A standby that a person brought back to a point takes changesets.
        RewoundGoesOn,
        /// What the standby may have otherwise is compared with the active all the same.
        LeftOutIsCompared,
        /// The trees are compared while changesets are under way.
        ComparedWhileUnderWay,
        /// The digest of a pack's index that the standby made by itself is not checked.
        RebuiltDigestsAreNotChecked,
    }

    impl SeededBug {
        /// How many there are.
        pub const COUNT: u32 = SeededBug::RebuiltDigestsAreNotChecked as u32;
    }

    static ON: AtomicU32 = AtomicU32::new(0);
    static REACHED: AtomicU64 = AtomicU64::new(0);
    static TURN: Mutex<()> = Mutex::new(());

    /// Holds a bug on, or all of them off; nobody else switches meanwhile.
    pub struct Switched(#[allow(dead_code)] MutexGuard<'static, ()>); // held, not read

    /// Switches a bug on, or all of them off, until what it returns is dropped. Waits for its turn.
    pub fn switch(bug: Option<SeededBug>) -> Switched {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        REACHED.store(0, Ordering::Relaxed);
        ON.store(bug.map_or(0, |bug| bug as u32), Ordering::SeqCst);
        Switched(turn)
    }

    impl Drop for Switched {
        fn drop(&mut self) {
            ON.store(0, Ordering::SeqCst);
        }
    }

    /// Whether this bug is on.
    pub fn is_on(bug: SeededBug) -> bool {
        let is_on = ON.load(Ordering::Relaxed) == bug as u32;
        if is_on {
            REACHED.fetch_add(1, Ordering::Relaxed);
        }
        is_on
    }

    /// How many times the place of the bug was reached since it was switched on.
    pub fn reached() -> u64 {
        REACHED.load(Ordering::Relaxed)
    }
}
