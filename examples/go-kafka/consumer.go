// A consumer of Orthanc's events on Kafka, complete and without our package: docs/any-language.md says what it has to
// do, rule by rule. Make handle your own.
package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/cloudevents/sdk-go/v2/binding/spec"
	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
)

const events, drain = "orthanc.events", 25 * time.Second

var (
	name        = env("CONSUMER", "go")
	maxAttempts = number("MAX_ATTEMPTS", 20)
	ackWait     = time.Duration(number("ACK_WAIT", 30)) * time.Second // a worker that is silent for so long is given up
	steps       = []int{1, 5, 30, 120, 600, 3600}                     // seconds that a retry waits in each topic of delays
	inbox, dead = "orthanc.inbox." + name, "orthanc.dead." + name
	largest     = 1_000_012 // bytes of a batch of copies, or what the topics take (ofEvents)
)

type place struct {
	topic     string
	partition int32
}
type job struct {
	stop func()
	done chan struct{}
}

type Retry struct{ After time.Duration }
type Reject struct{ Reason string }

func (Retry) Error() string  { return "later" }
func (Reject) Error() string { return "never" }

// Your work. It returns nil: done; Retry: again behind that time; Reject: never; another error: again, and behind
// MAX_ATTEMPTS never. No patient data in the reason of a Reject.
func handle(e event.Event, attempt int) error {
	say(map[string]any{"did": "begin", "attempt": attempt, "event": e})
	defer say(map[string]any{"did": "end", "id": e.ID()})
	var told map[string]string // what `orthanc-events conformance` tells it to do: leave it out
	json.Unmarshal([]byte(env("CONFORMANCE", "{}")), &told)
	switch what := told[e.Subject()]; {
	case what == "retry" && attempt == 1:
		return Retry{time.Second}
	case what == "later":
		return Retry{time.Hour}
	case what == "reject":
		return Reject{"told to"}
	case what == "fail":
		return fmt.Errorf("never said, it can have patient data: %s", e.Data())
	case what == "slow":
		time.Sleep(2 * time.Second)
	case what == "hang":
		select {}
	}
	return nil
}

// A panic is a failure like any other: it must not end the worker again and again.
func safely(e event.Event, attempt int) (failure error) {
	defer func() {
		if recover() != nil {
			failure = errors.New("a panic")
		}
	}()
	return handle(e, attempt)
}

func decode(headers map[string]string, body []byte) (e event.Event, err error) {
	e = event.New()
	if strings.HasPrefix(headers["content-type"], event.ApplicationCloudEventsJSON) {
		err = json.Unmarshal(body, &e)
	} else if version := spec.WithPrefix("ce_").Version(headers["ce_specversion"]); version != nil {
		e.Context = version.NewContext()
		for header, value := range headers {
			if attribute := version.Attribute(header); attribute != nil {
				err = errors.Join(err, attribute.Set(e.Context, value))
			} else if extension, ours := strings.CutPrefix(header, "ce_"); ours && extension != "specversion" {
				e.SetExtension(extension, value)
			}
		}
		e.SetDataContentType(headers["content-type"])
		e.DataEncoded = body
	} else {
		err = errors.New("there are no headers of a CloudEvent")
	}
	return e, errors.Join(err, e.Validate())
}

func settle(client *kgo.Client, record *kgo.Record) error {
	given := map[string]string{}
	for _, header := range record.Headers {
		given[strings.ToLower(header.Key)] = string(header.Value)
	}
	attempt := 1
	if given["orthanc-consumer"] == name {
		before, _ := strconv.Atoi(given["orthanc-attempts"])
		attempt += before
	}
	e, failure := decode(given, record.Value)
	if failure != nil {
		failure = Reject{"it is no CloudEvent"}
	} else {
		failure = safely(e, attempt)
	}
	if failure == nil {
		return nil
	}
	now := time.Now()
	said := map[string]string{"orthanc-consumer": name, "orthanc-attempts": strconv.Itoa(attempt),
		"orthanc-address": or(given["orthanc-address"], record.Topic), "orthanc-last-failure": iso(now),
		"orthanc-first-failure": or(given["orthanc-first-failure"], iso(now))}
	over, wait := attempt >= maxAttempts, min(900*time.Second, time.Second<<min(attempt-1, 30))
	said["orthanc-reason"] = fmt.Sprintf("failed %d times of %d", attempt, maxAttempts)
	var retry Retry
	var reject Reject
	switch {
	case errors.As(failure, &reject):
		over, said["orthanc-reason"] = true, reject.Reason
	case errors.As(failure, &retry):
		wait = retry.After
	default:
		said["orthanc-exception"] = fmt.Sprintf("%T", failure) // its type alone
	}
	if over {
		return copyTo(client, dead, []byte(rand.Text()), record, said) // a letter of its own: the topic is compacted
	}
	delete(said, "orthanc-reason")
	said["orthanc-operation"], said["orthanc-due"] = "retry", iso(now.Add(wait+time.Millisecond))
	return copyTo(client, delay(wait), record.Key, record, said)
}

// The same bytes and headers, and what is to be said. It is stored, on all replicas in step, when this returns.
func copyTo(client *kgo.Client, topic string, key []byte, record *kgo.Record, said map[string]string) error {
	sent := &kgo.Record{Topic: topic, Key: key, Value: record.Value}
	for _, header := range record.Headers {
		if _, anew := said[header.Key]; !anew && (topic != dead || header.Key != "orthanc-due") {
			sent.Headers = append(sent.Headers, header)
		}
	}
	for header, value := range said {
		sent.Headers = append(sent.Headers, kgo.RecordHeader{Key: header, Value: []byte(strings.Map(printable, value))})
	}
	return client.ProduceSync(context.Background(), sent).FirstErr()
}

func printable(one rune) rune {
	if one < ' ' || one > '~' {
		return '?'
	}
	return one
}

func delay(wait time.Duration) string {
	step := steps[0]
	for _, one := range steps {
		if time.Duration(one)*time.Second <= wait {
			step = one
		}
	}
	return fmt.Sprintf("orthanc.retry.%s.%d", name, step)
}

// A worker has one partition, and handles what is in it in order: that of a study is in one. In a topic of delays it
// waits until a record is due, or has waited there for the topic's time and a moment: no record there holds up others
// for longer.
func work(stop context.Context, client *kgo.Client, records []*kgo.Record) {
	for _, record := range records {
		var due time.Time
		for _, header := range record.Headers {
			if header.Key == "orthanc-due" {
				due, _ = time.Parse(time.RFC3339, string(header.Value))
			}
		}
		until := due
		if rest, waits := strings.CutPrefix(record.Topic, "orthanc.retry."+name+"."); waits {
			step, _ := strconv.Atoi(rest)
			if over := record.Timestamp.Add(time.Duration(step)*time.Second + 100*time.Millisecond); over.Before(until) {
				until = over
			}
		}
		select {
		case <-stop.Done():
		case <-time.After(time.Until(until)):
		}
		if stop.Err() != nil {
			return // not begun: it is for whoever has the partition next
		}
		var err error
		if left := time.Until(due); left > 0 {
			err = copyTo(client, delay(left), record.Key, record, nil)
		} else {
			err = settle(client, record)
		}
		if err != nil {
			log.Fatalf("not settled, and it comes again at the next start: %v", err)
		}
		client.MarkCommitRecords(record)
	}
}

// What is to be as for the events themselves: a copy is stored as safely, and is larger by its headers.
func ofEvents(ctx context.Context, admin *kadm.Client) (map[string]*string, error) {
	settings := map[string]*string{}
	found, err := admin.DescribeTopicConfigs(ctx, events)
	for _, topic := range found {
		err = errors.Join(err, topic.Err)
		for _, one := range topic.Configs {
			switch one.Key {
			case "min.insync.replicas":
				settings[one.Key] = one.Value
			case "max.message.bytes":
				most, _ := strconv.Atoi(one.MaybeValue())
				largest = most + 64<<10
				settings[one.Key] = kadm.StringPtr(strconv.Itoa(largest))
			}
		}
	}
	return settings, err
}

// What it needs at Kafka is made, and where it begins is fixed before it begins.
func prepare(ctx context.Context, admin *kadm.Client) []string {
	topics, err := admin.ListTopics(ctx, events)
	if err != nil || len(topics[events].Partitions) == 0 {
		log.Fatalf("there is no topic %s: start the bridge first (%v)", events, err)
	}
	count, replicas := int32(len(topics[events].Partitions)), int16(topics[events].Partitions.NumReplicas())
	own := []string{inbox}
	for _, step := range steps {
		own = append(own, delay(time.Duration(step)*time.Second))
	}
	settings, err := ofEvents(ctx, admin)
	if err != nil {
		log.Fatal(err)
	}
	made, err := admin.CreateTopics(ctx, count, replicas, settings, own...)
	settings["cleanup.policy"] = kadm.StringPtr("compact")
	letters, failed := admin.CreateTopics(ctx, 1, replicas, settings, dead)
	made[dead] = letters[dead]
	for topic, one := range made {
		if one.Err != nil && !errors.Is(one.Err, kerr.TopicAlreadyExists) {
			err = errors.Join(err, fmt.Errorf("%s: %w", topic, one.Err))
		}
	}
	if err = errors.Join(err, failed); err != nil {
		log.Fatal(err)
	}
	found, err := admin.FetchOffsets(ctx, name)
	for ; err != nil && ctx.Err() == nil; found, err = admin.FetchOffsets(ctx, name) {
		log.Printf("Kafka does not know the group yet: %v", err) // in a new cluster it takes a moment
		time.Sleep(time.Second)
	}
	begin, err := admin.ListEndOffsets(ctx, events)
	if env("START", "new") == "oldest" || len(found) > 0 {
		begin, err = admin.ListStartOffsets(ctx, events)
	}
	if err != nil {
		log.Fatal(err)
	}
	offsets := begin.Offsets()
	offsets.DeleteFunc(func(o kadm.Offset) bool { _, is := found.Lookup(o.Topic, o.Partition); return is })
	if len(offsets) > 0 {
		done, err := admin.CommitOffsets(ctx, name, offsets)
		if err == nil {
			err = done.Error()
		}
		// Where others are at work it is refused: they have done it.
		if err != nil && !errors.Is(err, kerr.UnknownMemberID) && !errors.Is(err, kerr.IllegalGeneration) && !errors.Is(err, kerr.RebalanceInProgress) {
			log.Fatal(err)
		}
	}
	return append(own, events)
}

func main() {
	if len(os.Args) > 2 && os.Args[1] == "--decode" { // golden vectors
		decodeAll(os.Args[2])
		return
	}
	seeds := kgo.SeedBrokers(strings.Split(strings.ReplaceAll(env("BROKER_URL", "kafka://127.0.0.1:9094"), "kafka://", ""), ",")...)
	stop, end := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer end()
	plain, err := kgo.NewClient(seeds)
	if err != nil {
		log.Fatal(err)
	}
	topics := prepare(stop, kadm.NewClient(plain))
	var atWork sync.WaitGroup
	var jobs sync.Map // of each partition: what is at work on it
	moved := func(ctx context.Context, client *kgo.Client, places map[string][]int32) {
		for topic, partitions := range places {
			for _, one := range partitions {
				if found, is := jobs.Load(place{topic, one}); is {
					found.(job).stop() // what is begun ends first: nobody else handles a later one of its key meanwhile
					<-found.(job).done
				}
			}
		}
		client.CommitMarkedOffsets(ctx)
	}
	client, err := kgo.NewClient(seeds, kgo.ConsumerGroup(name), kgo.ConsumeTopics(topics...), kgo.AutoCommitMarks(),
		kgo.AutoCommitInterval(100*time.Millisecond), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
		kgo.SessionTimeout(max(ackWait, 6*time.Second)), kgo.HeartbeatInterval(ackWait/3), kgo.BlockRebalanceOnPoll(),
		kgo.UnknownTopicRetries(-1),                       // they have just been made
		kgo.ProducerBatchCompression(kgo.NoCompression()), // orthanc-events dlq reads no snappy
		kgo.ProducerBatchMaxBytes(int32(largest)),
		kgo.OnPartitionsRevoked(moved), kgo.OnPartitionsLost(moved))
	if err != nil {
		log.Fatal(err)
	}
	say(map[string]any{"did": "ready"})
	for stop.Err() == nil {
		fetches := client.PollFetches(stop)
		fetches.EachError(func(topic string, partition int32, err error) {
			if stop.Err() == nil {
				log.Printf("nothing is received from %s/%d: %v", topic, partition, err)
			}
		})
		fetches.EachPartition(func(some kgo.FetchTopicPartition) {
			if len(some.Records) == 0 {
				return
			}
			only := map[string][]int32{some.Topic: {some.Partition}}
			client.PauseFetchPartitions(only) // nothing more of it until this is settled
			until, end := context.WithCancel(stop)
			one := job{end, make(chan struct{})}
			jobs.Store(place{some.Topic, some.Partition}, one)
			atWork.Go(func() {
				work(until, client, some.Records)
				client.ResumeFetchPartitions(only)
				close(one.done)
			})
		})
		client.AllowRebalance()
	}
	time.AfterFunc(drain, func() { os.Exit(1) }) // what has not ended by then comes again
	atWork.Wait()
	client.CommitMarkedOffsets(context.Background())
	client.Close() // which leaves the group
}

func decodeAll(file string) {
	text, err := os.ReadFile(file)
	var vectors []struct {
		Headers map[string]string
		Body    string
	}
	if err = errors.Join(err, json.Unmarshal(text, &vectors)); err != nil {
		log.Fatal(err)
	}
	for _, one := range vectors {
		e, err := decode(one.Headers, []byte(one.Body))
		if err != nil {
			log.Fatal(err)
		}
		say(e)
	}
}

func say(what any) {
	line, _ := json.Marshal(what)
	os.Stdout.Write(append(line, '\n'))
}

func iso(at time.Time) string { return at.UTC().Format("2006-01-02T15:04:05.000Z") }

func env(variable, otherwise string) string { return or(os.Getenv(variable), otherwise) }

func or(text, otherwise string) string {
	if text == "" {
		return otherwise
	}
	return text
}

func number(variable string, otherwise int) int {
	if found, err := strconv.Atoi(os.Getenv(variable)); err == nil {
		return found
	}
	return otherwise
}
