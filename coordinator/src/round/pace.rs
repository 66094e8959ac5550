//! How fast the members of a round are, and from when on one of them is late.
//!
//! A member owes one thing after the other: the evaluation of what it was given, its steps, its update. It is late when it
//! has got nowhere with the next of them for much longer than that should take, by its own quickest step or evaluation
//! so far, or by bytes and the bandwidth that was seen. Who gets on is not late, however slow it is; nor is who waits for
//! the others' commits to a shared body. Nothing here reads the clock.

use std::collections::BTreeMap;

use super::ParticipantName;

/// So many times what something should take is still in time,
const MARGIN: u64 = 8;
/// and this beyond it: whatever a device does besides, a lost connection that nobody has noticed yet included.
pub(super) const GRACE_MS: u64 = 60_000;
/// What may be taken for something of which nothing is known.
pub(super) const UNMEASURED_MS: u64 = 600_000;
/// Who moves less than this is not seen to move.
const BANDWIDTH_MIN_BYTES_PER_S: u64 = 1024;
/// To move more than so many times the bytes of what is owed is no progress with it.
const MOVED_MAX: u64 = 2;
/// Who comes back so often without having got on in between gets no more time for it.
const RETURNS_MAX: u32 = 3;
/// An evaluation moves at most the bytes of so many steps, as far as anybody waits for it.
const EVALUATION_STEPS: u64 = 64;

/// What a round is made of, as far as it takes time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Nobody begins a step of a shared body before all have committed the one before.
    pub in_step: bool,
    pub local_steps: u64,
    /// Activations and gradients of one member's step.
    pub step_bytes: u64,
    /// A member's share of the adapter, each way.
    pub adapter_bytes: u64,
}

/// What has been seen of a participant so far.
#[derive(Debug, Clone, Copy, Default)]
struct Measured {
    step_ms: Option<u64>,
    evaluation_ms: Option<u64>,
    bytes_per_s: Option<u64>,
}

/// How far a member has come.
#[derive(Debug, Clone, Copy)]
struct Progress {
    /// What it owes before any step.
    before: Option<Owed>,
    steps: u64,
    /// When it got on last.
    since_ms: u64,
    /// What has moved since, and when it was looked at.
    moved_bytes: u64,
    looked_ms: u64,
    /// How often it has come back since.
    returns: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owed {
    Evaluation,
    /// Of the training records, for an importance matrix: once in a run, so that nothing is known of how long it takes.
    Measurement,
    Step,
    Update,
}

#[derive(Debug, Default)]
pub(super) struct Pace {
    pub(super) sizes: Sizes,
    measured: BTreeMap<ParticipantName, Measured>,
    members: BTreeMap<ParticipantName, Progress>,
    /// Steps that all members have done, and since when.
    common: (u64, u64),
    /// The disk is full: nobody is answered, and nobody is late.
    held: bool,
}

impl Pace {
    pub(super) fn new(sizes: Sizes) -> Self {
        Self { sizes, ..Self::default() }
    }

    /// A round, or the final evaluation, begins with these; or goes on, and how far they are will be seen.
    pub(super) fn begin<'a>(
        &mut self,
        members: impl IntoIterator<Item = &'a ParticipantName>,
        before: Option<Owed>,
        now_ms: u64,
    ) {
        let progress = Progress { before, steps: 0, since_ms: now_ms, moved_bytes: 0, looked_ms: now_ms, returns: 0 };
        self.members = members.into_iter().map(|name| (name.clone(), progress)).collect();
        self.common = (0, now_ms);
    }

    /// Nothing is owed by this member any more.
    pub(super) fn leave(&mut self, participant: &ParticipantName, now_ms: u64) {
        self.members.remove(participant);
        self.look_round(now_ms);
    }

    /// It is back, and has to find its place first. To come back is no progress, and does not count as such for ever.
    pub(super) fn returned(&mut self, participant: &ParticipantName, now_ms: u64) {
        if let Some(progress) = self.members.get_mut(participant).filter(|progress| progress.returns < RETURNS_MAX) {
            progress.returns += 1;
            progress.begin_again(now_ms);
        }
    }

    /// `steps` of the round are done.
    pub(super) fn stepped(&mut self, participant: &ParticipantName, steps: u64, now_ms: u64) {
        let began_ms = self.owing_since(participant);
        let Some(progress) = self.members.get_mut(participant) else { return };
        // A step that is reported after another one, or after a while away, says nothing of how long it took.
        if steps == progress.steps + 1 && progress.steps > 0 {
            let took_ms = now_ms.saturating_sub(began_ms);
            let measured = self.measured.entry(participant.clone()).or_default();
            measured.step_ms = Some(measured.step_ms.map_or(took_ms, |known| known.min(took_ms)));
        }
        if steps > progress.steps {
            (progress.steps, progress.before) = (steps, None);
            progress.get_on(now_ms);
        }
        self.look_round(now_ms);
    }

    pub(super) fn evaluated(&mut self, participant: &ParticipantName, now_ms: u64) {
        let evaluates = |progress: &&mut Progress| progress.before == Some(Owed::Evaluation);
        let Some(progress) = self.members.get_mut(participant).filter(evaluates) else { return };
        let took_ms = now_ms.saturating_sub(progress.since_ms);
        let measured = self.measured.entry(participant.clone()).or_default();
        measured.evaluation_ms = Some(measured.evaluation_ms.map_or(took_ms, |known| known.max(took_ms)));
        progress.before = None;
        progress.get_on(now_ms);
    }

    /// So many bytes more have crossed its connection since that was last looked at.
    pub(super) fn moved(&mut self, participant: &ParticipantName, bytes: u64, now_ms: u64) {
        let Some(owed) = self.owed(participant) else { return };
        let Some(progress) = self.members.get_mut(participant) else { return };
        let elapsed_ms = now_ms.saturating_sub(progress.looked_ms).max(1);
        let bytes_per_s = bytes.saturating_mul(1000) / elapsed_ms;
        progress.looked_ms = now_ms;
        progress.moved_bytes = progress.moved_bytes.saturating_add(bytes);
        if bytes_per_s < BANDWIDTH_MIN_BYTES_PER_S {
            return;
        }
        let measured = self.measured.entry(participant.clone()).or_default();
        measured.bytes_per_s = measured.bytes_per_s.max(Some(bytes_per_s));
        if progress.moved_bytes <= self.sizes.bytes(owed).saturating_mul(MOVED_MAX) {
            progress.since_ms = now_ms;
        }
    }

    pub(super) fn hold(&mut self) {
        self.held = true;
    }

    pub(super) fn release(&mut self, now_ms: u64) {
        self.held = false;
        self.members.values_mut().for_each(|progress| progress.begin_again(now_ms));
        self.common.1 = now_ms;
    }

    /// From when on a member is late, unless it gets on before; None where the others, or nobody, keep it waiting.
    pub(super) fn late_from_ms(&self, participant: &ParticipantName) -> Option<u64> {
        let (owed, progress) = (self.owed(participant)?, self.members.get(participant)?);
        let waits = self.sizes.in_step && owed == Owed::Step && progress.steps > self.common.0;
        let allowed_ms = self.allowed_ms(participant, owed, progress.steps == 0);
        (!waits && !self.held).then(|| self.owing_since(participant).saturating_add(allowed_ms))
    }

    /// How much longer than usual a member that is lost may stay away: a slow device is slow at starting, too.
    pub(super) fn return_ms(&self, participant: &ParticipantName) -> u64 {
        let step_ms = self.measured.get(participant).and_then(|measured| measured.step_ms);
        step_ms.unwrap_or(0).saturating_mul(MARGIN)
    }

    fn allowed_ms(&self, participant: &ParticipantName, owed: Owed, is_first: bool) -> u64 {
        let Measured { step_ms, evaluation_ms, bytes_per_s } =
            self.measured.get(participant).copied().unwrap_or_default();
        let transfer_ms =
            bytes_per_s.map(|bytes_per_s| self.sizes.adapter_bytes.saturating_mul(1000) / bytes_per_s.max(1));
        let should_ms = match owed {
            Owed::Evaluation => evaluation_ms,
            Owed::Measurement => None,
            // The first comes behind the round's adapter.
            Owed::Step if is_first => step_ms.zip(transfer_ms).map(|(step_ms, transfer_ms)| step_ms + transfer_ms),
            Owed::Step => step_ms,
            Owed::Update => transfer_ms,
        };
        should_ms.map_or(UNMEASURED_MS, |should_ms| should_ms.saturating_mul(MARGIN).saturating_add(GRACE_MS))
    }

    fn owed(&self, participant: &ParticipantName) -> Option<Owed> {
        let progress = self.members.get(participant)?;
        Some(match progress {
            Progress { before: Some(owed), .. } => *owed,
            Progress { steps, .. } if *steps < self.sizes.local_steps => Owed::Step,
            _ => Owed::Update,
        })
    }

    /// A step of a shared body is owed from when on all have done the one before.
    fn owing_since(&self, participant: &ParticipantName) -> u64 {
        let since_ms = self.members.get(participant).map_or(0, |progress| progress.since_ms);
        let is_kept = self.sizes.in_step && self.owed(participant) == Some(Owed::Step);
        if is_kept { since_ms.max(self.common.1) } else { since_ms }
    }

    fn look_round(&mut self, now_ms: u64) {
        let steps = self.members.values().map(|progress| progress.steps).min().unwrap_or(0);
        if steps != self.common.0 {
            self.common = (steps, now_ms);
        }
    }
}

impl Sizes {
    fn bytes(&self, owed: Owed) -> u64 {
        match owed {
            Owed::Evaluation | Owed::Measurement => {
                self.adapter_bytes.saturating_add(self.step_bytes.saturating_mul(EVALUATION_STEPS))
            }
            Owed::Step => self.step_bytes.saturating_add(self.adapter_bytes),
            Owed::Update => self.adapter_bytes,
        }
    }
}

impl Progress {
    fn get_on(&mut self, now_ms: u64) {
        self.returns = 0;
        self.begin_again(now_ms);
    }

    fn begin_again(&mut self, now_ms: u64) {
        (self.since_ms, self.moved_bytes) = (now_ms, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: Sizes = Sizes { in_step: true, local_steps: 3, step_bytes: 4_000_000, adapter_bytes: 1_000_000 };

    fn name(name: &str) -> ParticipantName {
        ParticipantName::new(name)
    }

    fn round(sizes: Sizes, evaluates: bool) -> Pace {
        let mut pace = Pace::new(sizes);
        pace.begin(&["anna", "bert"].map(name), evaluates.then_some(Owed::Evaluation), 0);
        pace
    }

    fn late(pace: &Pace, who: &str) -> Option<u64> {
        pace.late_from_ms(&name(who))
    }

    #[test]
    fn who_gets_on_is_not_late_however_slow_it_is() {
        let mut pace = round(Sizes { in_step: false, ..SIZES }, false);
        let minute = 60_000;
        assert_eq!(late(&pace, "anna"), Some(UNMEASURED_MS));
        for steps in 1..=3 {
            let now_ms = steps * 9 * minute;
            assert!(late(&pace, "anna").is_some_and(|late_ms| now_ms < late_ms));
            pace.stepped(&name("anna"), steps, now_ms);
        }
        // The other one has done nothing, and was to be given up before.
        assert_eq!(late(&pace, "bert"), Some(UNMEASURED_MS));
    }

    #[test]
    fn a_member_is_late_by_its_own_quickest_step() {
        let mut pace = round(Sizes { in_step: false, ..SIZES }, false);
        for (steps, now_ms) in [(1, 5_000), (2, 7_000)] {
            pace.stepped(&name("anna"), steps, now_ms);
        }
        assert_eq!(late(&pace, "anna"), Some(7_000 + MARGIN * 2_000 + GRACE_MS));
        // To take longer and longer does not make the time longer and longer.
        let mut pace_of_a_slower = round(Sizes { in_step: false, local_steps: 9, ..SIZES }, false);
        for (steps, now_ms) in [(1, 0), (2, 2_000), (3, 12_000)] {
            pace_of_a_slower.stepped(&name("anna"), steps, now_ms);
        }
        assert_eq!(late(&pace_of_a_slower, "anna"), Some(12_000 + MARGIN * 2_000 + GRACE_MS));
    }

    #[test]
    fn who_waits_for_another_ones_commit_is_not_late() {
        let mut pace = round(SIZES, false);
        pace.stepped(&name("anna"), 1, 1_000);
        assert_eq!((late(&pace, "anna"), late(&pace, "bert")), (None, Some(UNMEASURED_MS)));
        pace.stepped(&name("bert"), 1, 400_000);
        // Both begin the next step now.
        pace.stepped(&name("anna"), 2, 401_000);
        pace.stepped(&name("bert"), 2, 405_000);
        assert_eq!(late(&pace, "anna"), Some(405_000 + MARGIN * 1_000 + GRACE_MS));
        assert_eq!(late(&pace, "bert"), Some(405_000 + MARGIN * 5_000 + GRACE_MS));
        // Nobody waits any more for one that is gone.
        pace.stepped(&name("anna"), 3, 406_000);
        assert_eq!(late(&pace, "anna"), Some(406_000 + UNMEASURED_MS), "an update, whose bandwidth nobody has seen");
        pace.leave(&name("bert"), 500_000);
        assert_eq!(late(&pace, "bert"), None);
    }

    #[test]
    fn bytes_are_progress_as_long_as_they_are_no_more_than_is_owed() {
        let mut pace = round(SIZES, false);
        pace.moved(&name("anna"), 5_000, 10_000);
        assert_eq!(late(&pace, "anna"), Some(UNMEASURED_MS), "a trickle of 500 B/s is none");
        pace.moved(&name("anna"), 1_000_000, 20_000);
        assert_eq!(late(&pace, "anna"), Some(20_000 + UNMEASURED_MS));
        // A step and an adapter have 5 MB, and what is lost is sent again.
        pace.moved(&name("anna"), 9_000_000, 30_000);
        assert_eq!(late(&pace, "anna"), Some(20_000 + UNMEASURED_MS));
        pace.stepped(&name("anna"), 1, 40_000);
        pace.stepped(&name("bert"), 1, 40_000);
        pace.moved(&name("anna"), 9_000_000, 50_000);
        assert_eq!(late(&pace, "anna"), Some(50_000 + UNMEASURED_MS));
    }

    #[test]
    fn an_update_is_late_by_its_bytes_and_the_bandwidth() {
        let mut pace = round(Sizes { in_step: false, ..SIZES }, false);
        pace.moved(&name("anna"), 500_000, 1_000);
        for (steps, now_ms) in [(1, 2_000), (2, 3_000), (3, 4_000)] {
            pace.stepped(&name("anna"), steps, now_ms);
        }
        let transfer_ms = 1_000_000 * 1000 / 500_000;
        assert_eq!(late(&pace, "anna"), Some(4_000 + MARGIN * transfer_ms + GRACE_MS));
    }

    #[test]
    fn an_evaluation_is_late_by_the_longest_before_it() {
        let mut pace = round(SIZES, true);
        assert_eq!(late(&pace, "anna"), Some(UNMEASURED_MS));
        pace.evaluated(&name("anna"), 30_000);
        pace.begin(&["anna", "bert"].map(name), Some(Owed::Evaluation), 100_000);
        assert_eq!(late(&pace, "anna"), Some(100_000 + MARGIN * 30_000 + GRACE_MS));
        assert_eq!(late(&pace, "bert"), Some(100_000 + UNMEASURED_MS));
    }

    #[test]
    fn who_comes_back_again_and_again_and_gets_nowhere_is_late() {
        let mut pace = round(Sizes { in_step: false, ..SIZES }, false);
        for now_ms in [20_000, 40_000, 60_000] {
            pace.returned(&name("anna"), now_ms);
            assert_eq!(late(&pace, "anna"), Some(now_ms + UNMEASURED_MS));
        }
        pace.returned(&name("anna"), 80_000);
        assert_eq!(late(&pace, "anna"), Some(60_000 + UNMEASURED_MS));
        // Who gets on may come back as often again.
        pace.stepped(&name("anna"), 1, 90_000);
        pace.returned(&name("anna"), 100_000);
        assert_eq!(late(&pace, "anna"), Some(100_000 + UNMEASURED_MS));
    }

    #[test]
    fn nobody_is_late_while_the_disk_is_full() {
        let mut pace = round(SIZES, false);
        pace.hold();
        assert_eq!(late(&pace, "anna"), None);
        pace.release(10 * UNMEASURED_MS);
        assert_eq!(late(&pace, "anna"), Some(11 * UNMEASURED_MS));
    }
}
