// A JavaScript and TypeScript context: node runs cells for the agent, which is at the other end of descriptor 3.
//
// Cells are evaluated as in the console of a browser (V8's REPL mode, by way of the inspector): let and const may be
// declared again, await stands anywhere, the last expression is the value. An interrupt ends a cell that computes or
// awaits. One that computes after it has waited for the outside cannot be stopped without harm: there the agent ends node.
'use strict'

const fs = require('node:fs')
const inspector = require('node:inspector')
const util = require('node:util')
const v8 = require('node:v8')
const vm = require('node:vm')
const { createRequire, stripTypeScriptTypes } = require('node:module')
const { StringDecoder } = require('node:string_decoder')
const { Writable } = require('node:stream')
const { pathToFileURL } = require('node:url')
const { internalBinding } = require('internal/test/binding')
const { getOrInitializeCascadedLoader } = require('internal/modules/esm/loader')

const AGENT = 3
const TEXT_LIMIT = 1 << 20 // of one value, message or traceback, in characters
const INTERRUPTED = { type: 'error', name: 'KeyboardInterrupt', value: '', traceback: 'KeyboardInterrupt' }

const session = new inspector.Session()
session.connect()

// what leaves

const pause = new Int32Array(new SharedArrayBuffer(4))

function say(event) {
  let data = Buffer.from(`\n${JSON.stringify(event)}\n`) // an interrupt may have cut off the line before
  while (data.length) {
    try {
      data = data.subarray(fs.writeSync(AGENT, data))
    } catch (problem) {
      if (problem.code !== 'EAGAIN') throw problem
      Atomics.wait(pause, 0, 0, 1) // the agent waits for its client
    }
  }
}

function mimeOf(value) {
  const mime = { 'text/plain': util.inspect(value, { maxStringLength: TEXT_LIMIT }).slice(0, TEXT_LIMIT) }
  const prototype = value !== null && typeof value === 'object' ? Object.getPrototypeOf(value) : undefined
  if (prototype === Object.prototype || prototype === Array.prototype) {
    try {
      mime['application/json'] = JSON.parse(JSON.stringify(value))
    } catch {} // a cycle, a bigint
  }
  return mime
}

/** The stack of an error as far as it is the user's. */
function tracebackOf(problem) {
  if (!util.types.isNativeError(problem)) return util.inspect(problem)
  const lines = String(problem.stack).split('\n')
  const ours = lines.findIndex((line) => /^ {4}at .*(\(node:inspector:|javascript\.cjs:)/.test(line))
  return lines.slice(0, ours < 0 ? lines.length : ours).join('\n').slice(0, TEXT_LIMIT)
}

/** The error event for what was thrown, which can be anything. */
function errorOf(thrown, where = '') {
  try {
    const [name, value] = util.types.isNativeError(thrown)
      ? [String(thrown.name), String(thrown.message)]
      : ['Error', util.inspect(thrown)]
    return { type: 'error', name, value: value.slice(0, TEXT_LIMIT), traceback: where + tracebackOf(thrown) }
  } catch {
    return { type: 'error', name: 'Error', value: 'an error that cannot be shown', traceback: '' }
  }
}

// what cells find

const here = `${process.cwd()}/`

for (const name of ['stdout', 'stderr']) {
  const decoder = new StringDecoder('utf8')
  const stream = Object.assign(new Writable(), { fd: name === 'stdout' ? 1 : 2 })
  stream.write = (data, encoding, written) => { // at once and without state, for an interrupt may come in between
    const text = decoder.write(typeof data === 'string' ? Buffer.from(data) : data)
    if (text) say({ type: name, text })
    for (const then of [encoding, written]) if (typeof then === 'function') process.nextTick(then)
    return true
  }
  Object.defineProperty(process, name, { value: stream })
}
globalThis.console = new console.Console({ stdout: process.stdout, stderr: process.stderr, colorMode: false })
Object.assign(globalThis, { require: createRequire(here), module: { exports: {} }, exports: {} })
process.execArgv = []
process.on('uncaughtException', (problem) => process.stderr.write(`Uncaught ${tracebackOf(problem)}\n`))

// import() in a cell gets node's usual loader; for what the inspector evaluates there is none
internalBinding('module_wrap').setImportModuleDynamicallyCallback((_, specifier, phase, attributes, referrer) => {
  const from = /^[a-z]+:/.test(referrer) ? referrer : pathToFileURL(referrer?.startsWith('/') ? referrer : here).href
  return getOrInitializeCascadedLoader().import(specifier, from, attributes, phase)
})

const IMPORT =
  /^[ \t]*import\s+(?:([\w$]+)\s*,?\s*)?(?:\{([^}]*)\}\s*|\*\s*as\s+([\w$]+)\s*)?(?:from\s*)?(['"][^'"\n]+['"])(?:\s*with\s*(\{[^}]*\}))?[ \t]*;?/gm

/** An import statement, which only modules may have, as one that cells may have, too. */
function imported(_, byDefault, names, all, from, attributes) {
  const called = `await import(${from}${attributes ? `, { with: ${attributes} }` : ''})`
  if (all) return `const ${all} = ${called}${byDefault ? `, ${byDefault} = ${all}.default` : ''};`
  const parts = (names ?? '').split(',').map((name) => name.trim().replace(/\s+as\s+/, ': '))
  const wanted = [byDefault && `default: ${byDefault}`, ...parts].filter(Boolean)
  return wanted.length ? `const { ${wanted.join(', ')} } = ${called};` : `void ${called};`
}

// between the inspector's objects and ours

let taken
const taker = (() => {
  globalThis.__taker = { take: (value) => (taken = value) }
  let found
  session.post('Runtime.evaluate', { expression: '__taker' }, (_, answer) => (found = answer.result.objectId))
  delete globalThis.__taker
  return found
})()

/** The value that the inspector describes. */
function valueOf({ objectId, unserializableValue, value }) {
  taken = undefined
  session.post('Runtime.callFunctionOn', {
    objectId: taker,
    functionDeclaration: 'function (value) { this.take(value) }',
    arguments: [{ objectId, unserializableValue, value }],
  })
  return taken
}

// cells

const guarded = new vm.Script('globalThis[Symbol.for("sandgate")]()') // vm is what can break on an interrupt
const { runMicrotasks } = internalBinding('task_queue')
let count = 0
let finish = null // ends the running cell
let pending // the promise of the running cell: node dies when one that the inspector waits for is collected
const abandoned = []

function run({ code, env, language }) {
  count += 1
  say({ type: 'count', execution_count: count })
  const before = Object.keys(env).map((name) => [name, process.env[name]])
  Object.assign(process.env, env)
  const done = (finish = (...events) => {
    if (finish !== done) return // it was interrupted before
    finish = null
    if (events[0] === INTERRUPTED) abandoned.push(pending)
    events.forEach(say)
    for (const [name, value] of before) {
      if (value === undefined) delete process.env[name]
      else process.env[name] = value
    }
    session.post('Runtime.releaseObjectGroup', { objectGroup: 'cell' })
    say({ type: 'end' })
  })
  try {
    if (language === 'typescript') code = stripTypeScriptTypes(code, { mode: 'transform' })
  } catch (problem) {
    return done({ type: 'error', name: 'SyntaxError', value: problem.message, traceback: `SyntaxError: ${problem.message}` })
  }
  evaluate(code, done)
}

function evaluate(code, done, isLastTry = false) {
  const name = `cell-${count}.js`
  const expression = `${code}\n//# sourceURL=${name}`
  globalThis[Symbol.for('sandgate')] = () => {
    delete globalThis[Symbol.for('sandgate')]
    const stop = v8.promiseHooks.onInit((promise) => {
      pending = promise
      stop()
    })
    session.post('Runtime.evaluate', { expression, replMode: true, objectGroup: 'cell' }, (refused, answer) => {
      if (refused) return done(INTERRUPTED)
      const value = valueOf(answer.exceptionDetails?.exception ?? answer.result)
      if (!answer.exceptionDetails) return settle(value, done)
      const { lineNumber, columnNumber } = answer.exceptionDetails
      if (!(value instanceof SyntaxError)) return done(errorOf(value))
      if (!isLastTry && /import statement/.test(value.message)) return evaluate(code.replace(IMPORT, imported), done, true)
      done(errorOf(value, `${name}:${lineNumber + 1}:${columnNumber + 1}\n`))
    })
    runMicrotasks() // here, so that what follows an await can be interrupted, too
  }
  try {
    guarded.runInThisContext({ breakOnSigint: true })
  } catch {
    done(INTERRUPTED)
  }
}

async function settle(value, done) {
  try {
    if (util.types.isPromise(value)) value = await value
    else await new Promise(setImmediate) // what else is ready to run belongs to this cell
    if (value === undefined) done()
    else done({ type: 'result', main: true, mime: mimeOf(value) })
  } catch (thrown) {
    done(errorOf(thrown))
  }
}

process.on('SIGINT', () => finish?.(INTERRUPTED))

const decoder = new StringDecoder('utf8')
let partial = ''
new (require('node:net').Socket)({ fd: AGENT, writable: false })
  .on('data', (data) => {
    const lines = (partial + decoder.write(data)).split('\n')
    partial = lines.pop()
    for (const line of lines) run(JSON.parse(line))
  })
  .on('error', () => {})
  .on('close', () => process.kill(process.pid, 'SIGKILL')) // the agent has hung up; nothing of the user's holds this up
